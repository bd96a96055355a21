"""`voco-llama convert`: a LLaVA or a checkpoint of the authors' code into this package's format."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import Dtype, parse_numbers


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder: llava-hf, or of the VoCo-LLaMA authors' code.")
    ],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write, new or empty.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the tokenizer. By default that of SOURCE.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the CLIP model. By default the one SOURCE names.")
    ] = None,
    vision_prefix_ids: Annotated[
        str | None,
        typer.Option(metavar="ID[,ID...]", help="Token ids before the vision tokens. By default the BOS token."),
    ] = None,
    vision_suffix_ids: Annotated[
        str | None,
        typer.Option(metavar="ID[,ID...]", help="Token ids after the vision tokens. By default the newline."),
    ] = None,
    num_voco_tokens: Annotated[
        int | None, typer.Option("--num-voco-tokens", "-k", min=1, help="VoCo tokens of an image by default.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Data type to write. By default that of SOURCE.")] = None,
) -> None:
    """Convert a LLaVA checkpoint, or one of the VoCo-LLaMA authors' code.

    voco-llama convert llava-1.5-7b-hf voco-llava-1.5-7b
    """
    prefix = None if vision_prefix_ids is None else parse_numbers(vision_prefix_ids, "--vision-prefix-ids")
    suffix = None if vision_suffix_ids is None else parse_numbers(vision_suffix_ids, "--vision-suffix-ids")

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .loading import silence_transformers

    with Console(stderr=True).status(f"Converting {source}"):
        silence_transformers()
        from voco_llama_hf.conversion import convert_checkpoint

        report = convert_checkpoint(
            source,
            target,
            tokenizer=tokenizer,
            vision_tower=vision_tower,
            vision_prefix_token_ids=prefix,
            vision_suffix_token_ids=suffix,
            num_voco_tokens=num_voco_tokens,
            dtype=None if dtype is None else dtype.value,
        )
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in asdict(report).items():
        if name != "warnings":
            text = f"{value:,}" if name == "num_parameters" else str(value)
            table.add_row(name.replace("_", " "), text)
    Console().print(table)
    for warning in report.warnings:
        typer.echo(f"Warning: {warning}", err=True)
