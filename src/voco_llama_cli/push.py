"""`voco-llama push`: a saved model to the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .card import check_model_folder
from .errors import UsageProblem
from .options import check_extra, human_bytes, plural


if TYPE_CHECKING:
    from voco_llama_hf.hub.push import PushPlan


def push(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or one of adapters.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the Hub, as in name/voco-llava-1.5-7b.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Add adapters to the weights of their base model, and push the whole.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model, for adapters that were trained on a folder.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be sent, and send nothing.")] = False,
) -> None:
    """Push a model to the Hub: weights, processor, code, card, and its folder onnx if it has one.

    voco-llama push voco-llava-1.5-7b name/voco-llava-1.5-7b --private

    voco-llama push voco-llama-7b-lora name/voco-llama-7b --merge

    The card is refreshed on the way, the folder is left as it is. After a lost connection run the command again.
    """
    check_model_folder(model)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise UsageProblem(f"REPO is the name of a repository, as in name/{model.absolute().name}, got {repo!r}")
    if merge:
        check_extra("--merge", "train", ["peft"])
    from rich.console import Console

    from .loading import silence_transformers

    silence_transformers()
    from voco_llama_hf.hub.card import hub_base
    from voco_llama_hf.hub.merge import merge_adapters
    from voco_llama_hf.hub.push import plan_push, push_model
    from voco_llama_hf.loading import is_adapter_folder, load_config

    is_adapter = is_adapter_folder(model)
    if merge and not is_adapter:
        raise UsageProblem(f"--merge adds adapters to their base model, but {model} has no adapter_config.json")
    load_config(str(model))
    base_model = base_model or (hub_base(model) if is_adapter else None)
    with tempfile.TemporaryDirectory(dir=model, prefix=".merged-") if merge else nullcontext(model) as name:
        folder = Path(name)
        if merge:
            with Console(stderr=True).status("Merging the adapters"):
                merge_adapters(model, folder)
        plan = plan_push(folder, repo, base_model=base_model, name=model.absolute().name)
        print_plan(plan)
        if dry_run:
            typer.echo(f"nothing was sent to {repo}")
            return
        commit = push_model(folder, repo, private, create_pr, plan=plan)
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
