"""`voco-llama export`: a model for other runtimes than PyTorch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UsageProblem
from .options import check_extra, human_bytes


if TYPE_CHECKING:
    from voco_llama_hf.export import ExportReport


class Precision(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class Quantization(StrEnum):
    int8 = "int8"
    int4 = "int4"


app = typer.Typer(help="Export a model for other runtimes.", no_args_is_help=True)


@app.callback()
def export() -> None:
    """Export a model for other runtimes."""


@app.command()
def onnx(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub id.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write, new or empty.")],
    precision: Annotated[Precision, typer.Option(help="Precision of weights and computation.")] = Precision.fp32,
    quantize: Annotated[
        Quantization | None, typer.Option(help="int8: dynamic quantization. int4: four-bit weights.")
    ] = None,
    provider: Annotated[
        str | None,
        typer.Option(
            help="Execution provider of ONNX Runtime to fuse the graphs for and to run them on, as "
            "CPUExecutionProvider. By default they are for any provider."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Device that PyTorch runs on: cpu, cuda, cuda:1, ...")] = "cpu",
    images: Annotated[
        list[str] | None,
        typer.Option("--image", help="Image to compare answers on, repeatable. By default two of the package."),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option("--question", help="What to ask about each image, repeatable. By default six questions."),
    ] = None,
    atol: Annotated[
        float | None,
        typer.Option(min=0, help="Largest absolute difference of a graph. By default 1e-3 in fp32, any in others."),
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder that a model from the Hub is downloaded to. By default the Hub's own.")
    ] = None,
    opset: Annotated[int | None, typer.Option(min=18, help="ONNX opset. By default that of the exporter.")] = None,
) -> None:
    """Export a model as two ONNX graphs, whose answers are compared with PyTorch's before they are written.

    voco-llama export onnx voco-llama-7b voco-llama-7b-onnx --precision fp16
    """
    check_extra("export onnx", "export", ("onnx", "onnxruntime", "onnxscript"))
    from voco_llama_hf.images import open_image

    from .loading import find_device, find_model, load_model, silence_transformers

    name = find_model(model)
    pictures = None if images is None else [open_image(path) for path in images]

    from rich.console import Console

    silence_transformers()
    with Console(stderr=True).status("Loading ONNX Runtime") as status:
        try:
            from voco_llama_hf.export import export_onnx
        except ImportError as error:
            raise UsageProblem(str(error)) from None
        from voco_llama_hf.export.providers import check_provider
        from voco_llama_hf.files import check_new_folder

        # Before the model is loaded, which may take long
        check_new_folder(output)
        check_provider(provider or "CPUExecutionProvider")
        find_device(device)
        if cache_dir is not None and not Path(name).is_dir():
            status.update(f"Downloading {name}")
            name = download(name, cache_dir)
        status.stop()
        network, processor = load_model(name, device, None, merge=True)
        status.start()
        report = export_onnx(
            network,
            output,
            processor,
            precision=precision.value,
            quantize=None if quantize is None else quantize.value,
            provider=provider,
            opset=opset,
            images=pictures,
            questions=questions,
            atol=atol,
            progress=status.update,
        )
    print_report(report, output)


def download(name: str, cache_dir: Path) -> str:
    """The folder of a model from the Hub, downloaded to another place than the Hub's own."""
    from huggingface_hub import snapshot_download

    return snapshot_download(name, cache_dir=cache_dir, allow_patterns=["*.json", "*.safetensors", "*.jinja"])


def print_report(report: ExportReport, output: Path) -> None:
    """How far the graphs are from PyTorch, how they answer, and how large they are."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "sizes", "largest difference", "relative", "allowed", box=box.SIMPLE)
    for difference in report.differences:
        sizes = ", ".join(f"{name} {size}" for name, size in difference.sizes.items())
        table.add_row(
            difference.graph,
            sizes,
            f"{difference.absolute:.1e}",
            f"{difference.relative:.1e}",
            "any" if difference.rtol is None else f"{difference.rtol:.0e}",
        )
    Console().print(table)
    if (answers := report.answers) is not None:
        typer.echo(
            f"{answers.num_same} of {answers.num_tokens} tokens of PyTorch's answers are the same; logits differ by "
            f"{answers.difference:.1e} of their size in the median, allowed is {answers.max_difference:.0e}"
        )
    for name, size in report.sizes.items():
        typer.echo(f"{output}: {name} {human_bytes(size)}")
