"""Trains a checkpoint that reads the scenes, from its recipe to its results on the test split: `make train-tiny`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .phases import train
from .publishing import publish
from .recipe import RECIPES


class RecipeName(StrEnum):
    """Keys of [`RECIPES`]."""

    scenes_64 = "scenes-64"
    scenes_576 = "scenes-576"


def main(
    recipe: Annotated[RecipeName, typer.Option(help="What to train.")] = RecipeName.scenes_64,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder of trainer checkpoints and logs. By default in runs/, as the recipe.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the finished checkpoint. By default in the work folder.")
    ] = None,
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
) -> None:
    """Train the tokenizer and the model on scenes, evaluate it and write the checkpoint."""
    work_dir = work_dir or Path("runs") / recipe.value
    work_dir.mkdir(parents=True, exist_ok=True)
    train(RECIPES[recipe.value], work_dir, compile)
    publish(work_dir, RECIPES[recipe.value], output_dir or work_dir / f"voco-{recipe.value}")


if __name__ == "__main__":
    typer.run(main)
