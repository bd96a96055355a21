"""`voco-llama benchmark`: what a question costs, about a compressed image and otherwise."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageProblem
from .options import Dtype, DtypeOption, ForceOption, ModelOption, check_output, check_train_extra, parse_numbers


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

PLOT_FORMATS = (".pdf", ".png", ".svg")
TABLE_WIDTH = 140


class Preset(str, Enum):
    """Shapes of models, with random weights."""

    llava_1_5_7b = "llava-1.5-7b"
    llama_3_8b = "llama-3-8b"
    tiny = "tiny"


class CacheKind(str, Enum):
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
    numbers = {
        option: check_numbers(text, option)
        for option, text in (
            ("--num-voco-tokens", num_voco_tokens),
            ("--batch-sizes", batch_sizes),
            ("--images", images),
            ("--compress-batch-sizes", compress_batch_sizes),
        )
    }
    for path in (output, markdown, plot):
        if path is not None:
            check_output(path, force)
    if plot is not None:
        check_train_extra("--plot", ["matplotlib"])
        if plot.suffix.lower() not in PLOT_FORMATS:
            raise UsageProblem(f"{plot} can be drawn as {', '.join(PLOT_FORMATS)} only")

    from rich.console import Console

    from voco_llama_hf.benchmark.report import make_sheets, plot_results

    console = Console(width=max(Console().width, TABLE_WIDTH))
    with Console(stderr=True).status("Loading") as status:
        results = run(
            *(model, preset, device, dtype, prompt_tokens, new_tokens, rounds, cache is CacheKind.static),
            *numbers.values(),
            report=status.update,
        )
    sheets = make_sheets(results)
    for sheet in sheets:
        sheet.print(console)
    if output is not None:
        write_aside(output, json.dumps(results, indent=2) + "\n")
    if markdown is not None:
        write_aside(markdown, "\n\n".join(sheet.markdown() for sheet in sheets) + "\n")
    if plot is not None:
        plot_results(results, plot)


def run(
    model: str | None,
    preset: Preset | None,
    device: str | None,
    dtype: Dtype | None,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    static: bool,
    num_voco_tokens: list[int],
    batch_sizes: list[int],
    images: list[int],
    compress_batch_sizes: list[int],
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Counts, and measures on every device but meta."""
    import torch

    from voco_llama_hf.benchmark.results import about, count
    from voco_llama_hf.benchmark.suite import Suite

    name, network, config = build(model, preset, device, dtype, report)
    torch_dtype: torch.dtype = network.dtype if network is not None else getattr(torch, (dtype or Dtype.bfloat16).value)
    results = about(name, network, torch_dtype)
    results |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
    results |= count(config, num_voco_tokens, prompt_tokens, images, torch_dtype, report)
    measured: dict[str, Any] = {
        name: [] for name in ("first_token", "decoding", "largest_batches", "compression", "many_images")
    }
    results |= measured
    if network is None:
        return results
    suite = Suite(network, num_voco_tokens[0], prompt_tokens, new_tokens, rounds, static, report)
    results["weight_reading"] = suite.weight_reading()
    for size in batch_sizes:
        measured["first_token"] += suite.first_tokens(size)
        measured["decoding"] += suite.decoding(size)
    measured["largest_batches"] += suite.largest_batches(max(batch_sizes))
    for size in compress_batch_sizes:
        measured["compression"] += suite.compression(size)
    for number in images:
        measured["many_images"] += suite.many_images(number)
    return results


def build(
    model: str | None, preset: Preset | None, device: str | None, dtype: Dtype | None, report: Callable[[str], None]
) -> tuple[str, Any, Any]:
    """Name, model (none on the meta device) and configuration."""
    from .loading import check_config, find_device, find_model, load_model, silence_transformers

    silence_transformers()
    import torch

    from voco_llama_hf.benchmark.presets import PRESETS, build_model
    from voco_llama_hf.modeling import VoCoLlamaConfig

    if preset is None:
        name = find_model(model)
        if device == "meta":
            check_config(name)
            return Path(name).name, None, VoCoLlamaConfig.from_pretrained(name)
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


def write_aside(path: Path, text: str) -> None:
    """Writes a file in one piece."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
