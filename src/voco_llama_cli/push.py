"""`voco-llama push`: a saved model to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .card import check_model_folder
from .errors import UsageProblem
from .options import human_bytes, plural


if TYPE_CHECKING:
    from voco_llama_hf.hub.push import PushPlan


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub, as in name/voco-llava-1.5-7b.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
) -> None:
    """Push a model to the Hub: weights, processor, code, card, and its folder onnx if it has one.

    voco-llama push voco-llava-1.5-7b name/voco-llava-1.5-7b --private

    The card is refreshed on the way, the folder is left as it is. After a lost connection run the command again.
    """
    check_model_folder(model)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise UsageProblem(f"REPO is the name of a repository, as in name/{model.absolute().name}, got {repo!r}")
    from .loading import check_config, silence_transformers

    silence_transformers()
    from voco_llama_hf.hub.push import plan_push, push_model

    check_config(str(model))
    plan = plan_push(model, repo)
    print_plan(plan)
    if dry_run:
        typer.echo(f"nothing was sent to {repo}")
        return
    commit = push_model(model, repo, private, create_pr, plan=plan)
    typer.echo(commit.pr_url or commit.commit_url)


def print_plan(plan: PushPlan) -> None:
    """What goes and how large it is, and what stays."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("file", "size", box=box.SIMPLE)
    table.columns[1].justify = "right"
    for file in plan.files:
        table.add_row(file.path, human_bytes(file.size))
    console = Console()
    console.print(table)
    console.print(f"{plural(len(plan.files), 'file')}, {human_bytes(plan.nbytes)}")
    if plan.left_out:
        console.print(f"left out: {', '.join(plan.left_out)}", soft_wrap=True)
