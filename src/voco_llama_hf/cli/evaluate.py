"""`voco-llama evaluate`: how well a checkpoint reads the scenes."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .errors import UsageProblem
from .options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    ModelOption,
    check_output,
    check_train_extra,
    join_numbers,
    parse_numbers,
)


TRAIN_EXTRA = ("datasets", "matplotlib", "sklearn")
PLOT_FORMATS = (".pdf", ".png", ".svg")
TABLE_WIDTH = 120
NUMBERS_OPTIONS = ("--num-voco-tokens", "-k")


class Split(str, Enum):
    """Splits of the scenes."""

    train = "train"
    validation = "validation"
    test = "test"


class Evaluate(TyperCommand):
    """Takes `-k 1 2 4` besides `-k 1,2,4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_numbers(args, NUMBERS_OPTIONS))


def evaluate(
    model: ModelOption = None,
    split: Annotated[Split, typer.Option(help="Split of the scenes.")] = Split.test,
    num_voco_tokens: Annotated[
        str, typer.Option(*NUMBERS_OPTIONS, metavar="K [K...]", help="Numbers of VoCo tokens to compare.")
    ] = "1 2 4 8",
    limit: Annotated[int, typer.Option(min=1, help="Scenes to ask about.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 128,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the results to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw the results into (.png, .pdf, .svg).")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how well a model answers questions about the scenes it was trained on.

    voco-llama evaluate --num-voco-tokens 1 2 4 8 --output results.json --plot results.png
    """
    check_train_extra("evaluate", TRAIN_EXTRA)
    counts = tuple(parse_numbers(num_voco_tokens, "--num-voco-tokens"))
    if not counts or min(counts) < 1:
        raise UsageProblem("--num-voco-tokens takes numbers from 1 on")
    for path in (output, plot):
        if path is not None:
            check_output(path, force)
    if plot is not None and plot.suffix.lower() not in PLOT_FORMATS:
        raise UsageProblem(f"{plot} can be drawn as {', '.join(PLOT_FORMATS)} only")
    from .loading import find_model, load_model

    network, processor = load_model(find_model(model), device, dtype)
    import datasets
    from rich.console import Console

    from ..modeling.processing_voco_llama import MAX_VOCO_TOKENS
    from ..training.evaluation import evaluate_scenes, plot_results, print_results

    if max(counts) > MAX_VOCO_TOKENS:
        raise UsageProblem(f"--num-voco-tokens can be at most {MAX_VOCO_TOKENS}, got {max(counts)}")
    datasets.disable_progress_bars()
    console = Console()
    results = evaluate_scenes(
        network,
        processor,
        split.value,
        num_voco_tokens=counts,
        batch_size=batch_size,
        limit=limit,
        progress=console.is_terminal,
    )
    # A narrower console would cut the numbers off, in a pipe too
    print_results(results, Console(width=max(console.width, TABLE_WIDTH)))
    if output is not None:
        results.save(output)
    if plot is not None:
        plot_results(results, plot)
