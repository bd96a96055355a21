"""`voco-llama check`: whether what is installed here computes right."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DeviceOption, DtypeOption, ModelOption


def check(
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option(help="eager, sdpa, flex_attention, ... By default the model's own."),
    ] = None,
) -> None:
    """Compare the ways of computing that must agree, on this machine with what is installed.

    For a new version of transformers or torch, a new device, or another attention.

    voco-llama check

    voco-llama check --device cuda --dtype bfloat16 --attn-implementation flash_attention_2
    """
    from .loading import find_model, load_model

    name = find_model(model)
    loaded, _ = load_model(name, device, dtype)
    import torch
    import transformers
    from rich.console import Console

    from voco_llama_hf.check import run_checks

    if attn_implementation is not None:
        loaded.set_attn_implementation(attn_implementation)
    attention = loaded.config.text_config._attn_implementation
    console = Console()
    console.print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, {loaded.device}, "
        f"{str(loaded.dtype).removeprefix('torch.')}, {attention} attention",
        highlight=False,
    )
    disagreeing = 0
    for result in run_checks(loaded):
        verdict = "[green]agrees[/]" if result.agrees else "[red]DIFFERS[/]"
        reason = result.problem or f"{result.error:.1e} (at most {result.tolerance:g})"
        console.print(f"{verdict}  {result.name}: {reason}", highlight=False)
        disagreeing += not result.agrees
    if disagreeing:
        raise typer.Exit(1)
