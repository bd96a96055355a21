"""`voco-llama benchmark`: what a question costs, about a compressed image and otherwise."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageProblem
from .options import (
    Dtype,
    DtypeOption,
    ForceOption,
    ModelOption,
    check_output,
    check_plot,
    check_train_extra,
    parse_numbers,
)


if TYPE_CHECKING:
    from collections.abc import Callable

TABLE_WIDTH = 140


class Preset(StrEnum):
    """Shapes of models, with random weights."""

    llava_1_5_7b = "llava-1.5-7b"
    llava_next_7b = "llava-next-7b"
    llama_3_8b = "llama-3-8b"
    tiny = "tiny"


class CacheKind(StrEnum):
    """Caches that `generate` fills."""

    dynamic = "dynamic"
    static = "static"


def benchmark(
    model: ModelOption = None,
    preset: Annotated[
        Preset | None, typer.Option(help="The shape of a known model, with random weights, instead of --model.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, cuda:1, ... By default the accelerator if there is one. "
            "meta counts FLOPs and bytes only, for a model of any size on any machine."
        ),
    ] = None,
    dtype: DtypeOption = None,
    num_voco_tokens: Annotated[
        str, typer.Option("--num-voco-tokens", "-k", help="VoCo tokens an image; times are measured with the first.")
    ] = "1,2,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 128,
    batch_sizes: Annotated[str, typer.Option(help="Questions at a time.")] = "1,8,64",
    images: Annotated[str, typer.Option(help="Images in one prompt.")] = "1,10,100,1000",
    compress_batch_sizes: Annotated[str, typer.Option(help="Images that are compressed at a time.")] = "1,32",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 33,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which medians are taken.")] = 11,
    cache: Annotated[
        CacheKind, typer.Option(help="Caches of generate; static ones with compiled decoding.")
    ] = CacheKind.dynamic,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write the results to.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Markdown file to write the tables to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw the results into (.png, .pdf, .svg).")] = None,
    force: ForceOption = False,
) -> None:
    """Measure what a question about a compressed image costs: beside no cache, a full cache, and text alone.

    voco-llama benchmark --preset llava-1.5-7b --device meta

    voco-llama benchmark --preset tiny --device cpu --output results.json --plot results.png
    """
    if model is not None and preset is not None:
        raise UsageProblem("give --model or --preset, not both")
    counts, sizes, many, compressed = (
        check_numbers(text, option)
        for text, option in (
            (num_voco_tokens, "--num-voco-tokens"),
            (batch_sizes, "--batch-sizes"),
            (images, "--images"),
            (compress_batch_sizes, "--compress-batch-sizes"),
        )
    )
    for path in (output, markdown, plot):
        if path is not None:
            check_output(path, force)
    if plot is not None:
        check_train_extra("--plot", ["matplotlib"])
        check_plot(plot)

    import torch
    from rich.console import Console

    from voco_llama_hf.benchmark.report import make_sheets, plot_results
    from voco_llama_hf.benchmark.results import about, count
    from voco_llama_hf.benchmark.suite import NOT_MEASURED, Suite
    from voco_llama_hf.files import written_aside

    console = Console(width=max(Console().width, TABLE_WIDTH))
    with Console(stderr=True).status("Loading") as status:
        name, network, config = build(model, preset, device, dtype, status.update)
        run_in: torch.dtype = network.dtype if network is not None else getattr(torch, (dtype or Dtype.bfloat16).value)
        results = about(name, network, run_in)
        results |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
        results |= count(config, counts, prompt_tokens, many, run_in, status.update)
        results |= NOT_MEASURED
        if network is not None:
            static = cache is CacheKind.static
            suite = Suite(network, counts[0], prompt_tokens, new_tokens, rounds, static, status.update)
            results |= suite.run(sizes, many, compressed)
    sheets = make_sheets(results)
    for sheet in sheets:
        sheet.print(console)
    if output is not None:
        with written_aside(output) as part:
            part.write_text(json.dumps(results, indent=2) + "\n")
    if markdown is not None:
        with written_aside(markdown) as part:
            part.write_text("\n\n".join(sheet.markdown() for sheet in sheets) + "\n")
    if plot is not None:
        plot_results(results, plot)


def build(
    model: str | None, preset: Preset | None, device: str | None, dtype: Dtype | None, report: Callable[[str], None]
) -> tuple[str, Any, Any]:
    """Name, model (none on the meta device) and configuration."""
    from .loading import find_device, find_model, load_model, silence_transformers

    silence_transformers()
    import torch

    from voco_llama_hf.benchmark.presets import PRESETS, build_model
    from voco_llama_hf.loading import load_config

    if preset is None:
        name = find_model(model)
        if device == "meta":
            return Path(name).name, None, load_config(name)
        network, _ = load_model(name, device, dtype)
        return Path(name).name, network, network.config
    config = PRESETS[preset.value]()
    if device == "meta":
        return preset.value, None, config
    torch_device = find_device(device)
    report(f"Making a random {preset.value}")
    return preset.value, build_model(config, torch_device, getattr(torch, (dtype or Dtype.bfloat16).value)), config


def check_numbers(text: str, option: str) -> list[int]:
    """
    Raises:
        UsageProblem: if `text` names no numbers from 1 on.
    """
    numbers = parse_numbers(text, option)
    if not numbers or min(numbers) < 1:
        raise UsageProblem(f"{option} takes numbers from 1 on, got {text!r}")
    return numbers
