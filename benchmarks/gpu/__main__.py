"""Runs the stages on a GPU, or all of them tiny on a CPU to see that nothing is mistyped.

python -m benchmarks.gpu
python -m benchmarks.gpu --stages question,decoding --model my-voco-llava-7b
python -m benchmarks.gpu --dry-run
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .machine import find_card, folder_name
from .record import FAILED, PASSED, SKIPPED, about
from .runner import ROOT, Outcome, Runner
from .stages import BY_NAME, STAGES, Stage


RESULTS = ROOT / "benchmarks" / "results" / "gpu"
WORK = ROOT / "runs" / "gpu"
COLOURS = {PASSED: "green", FAILED: "red", SKIPPED: "yellow"}
DRY_RUN_JOBS = 2  # at a time, since nothing is measured


def main(
    stages: Annotated[
        str | None, typer.Option(help=f"Separated by commas, of {', '.join(BY_NAME)}; by default all.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id; random weights of LLaVA-1.5-7B's shape by default."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of results; by default that of the card in benchmarks/results/gpu/."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Run every stage at a tiny shape on the CPU. Nothing is kept.")
    ] = False,
) -> None:
    """Check and measure all that needs a GPU. What an earlier run has measured is not measured again."""
    console = Console(width=120)
    chosen = choose(stages)
    card = find_card()
    if card is None and not dry_run:
        raise typer.BadParameter("nvidia-smi finds no GPU here; --dry-run runs every stage at a tiny shape on the CPU")
    command = shlex.join(["python", "-m", __package__, *sys.argv[1:]])
    head = about(find_folder(model), dry_run, command)
    with temporary_folder(dry_run and output is None) as aside:
        folder = output or aside or RESULTS / folder_name(card["card"] if card else "cpu")
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        work_dir = (aside or folder if dry_run else WORK / folder.name) / "work"
        runner = Runner(folder, work_dir, head, lambda line: console.print(line, highlight=False, markup=False))
        outcomes = run_all(runner, chosen, console, DRY_RUN_JOBS if dry_run else 1)
        console.print(make_table(outcomes))
        if any(outcome.status == FAILED for outcome in outcomes):
            print_logs(outcomes, folder, console, dry_run)
        elif not dry_run:
            console.print(f"Results are in {folder}; docs/source/costs.md says how to send them in.")
    if any(outcome.status == FAILED for outcome in outcomes):
        raise typer.Exit(1)


def choose(names: str | None) -> list[Stage]:
    """
    The stages that are named, in order of worth.

    Raises:
        typer.BadParameter: if there is no such stage.
    """
    given = [name.strip().replace("-", "_") for name in (names or ",".join(BY_NAME)).split(",") if name.strip()]
    unknown = [name for name in given if name not in BY_NAME]
    if unknown or not given:
        raise typer.BadParameter(f"--stages takes some of {', '.join(BY_NAME)}, got {names!r}")
    return [stage for stage in STAGES if stage.name in given]


def find_folder(model: str | None) -> str | None:
    """A model as its processes find it, which run in another folder."""
    return str(Path(model).absolute()) if model is not None and Path(model).is_dir() else model


def temporary_folder(is_needed: bool):
    return path_of(tempfile.TemporaryDirectory(prefix="voco-llama-gpu-")) if is_needed else nullcontext(None)


@contextmanager
def path_of(folder: tempfile.TemporaryDirectory) -> Iterator[Path]:
    with folder as name:
        yield Path(name)


def run_all(runner: Runner, stages: list[Stage], console: Console, jobs: int) -> list[Outcome]:
    """All stages, so many at a time; interrupted, those that have ended."""

    def run(stage: Stage) -> Outcome:
        console.print(f"[bold]{stage.name}[/] {stage.what}, at most {stage.limit} s", highlight=False)
        return runner.run(stage)

    if jobs > 1:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(run, stages))
    outcomes = []
    try:
        for stage in stages:
            outcomes.append(run(stage))
    except KeyboardInterrupt:
        console.print("Interrupted: a second run goes on from here.")
    return outcomes


def make_table(outcomes: list[Outcome]) -> Table:
    table = Table(title="Stages")
    for heading in ("stage", "", "seconds", ""):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for outcome in outcomes:
        status = f"[{COLOURS[outcome.status]}]{outcome.status}[/]"
        table.add_row(outcome.stage.name, status, f"{outcome.seconds:.0f}", outcome.reason.replace("[", "\\["))
    return table


def print_logs(outcomes: list[Outcome], folder: Path, console: Console, whole: bool) -> None:
    """Where the logs of failed stages are; in a dry run their ends, since nothing is kept."""
    for outcome in outcomes:
        log = folder / f"{outcome.stage.name}.log"
        if outcome.status == FAILED:
            console.rule(str(log))
            if whole:
                console.print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), markup=False)


if __name__ == "__main__":
    typer.run(main)
