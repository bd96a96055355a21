"""`voco-llama export`: a model for other runtimes than PyTorch."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
    opset: Annotated[int | None, typer.Option(min=18, help="ONNX opset. By default that of the exporter.")] = None,
) -> None:
    """Export a model as two ONNX graphs, run against PyTorch before they are written.

    voco-llama export onnx voco-llama-7b voco-llama-7b-onnx --precision fp16
    """
    check_extra("export onnx", "export", ("onnx", "onnxruntime", "onnxscript"))
    from .loading import find_model, load_model, silence_transformers

    name = find_model(model)

    from rich.console import Console

    silence_transformers()
    with Console(stderr=True).status("Loading ONNX Runtime") as status:
        from voco_llama_hf.export import export_onnx
        from voco_llama_hf.export.session import check_provider
        from voco_llama_hf.files import check_new_folder

        # Before the model is loaded, which may take long
        check_new_folder(output)
        check_provider(provider or "CPUExecutionProvider")
        status.stop()
        network, processor = load_model(name, "cpu", None)
        status.start()
        report = export_onnx(
            network,
            output,
            processor,
            precision=precision.value,
            quantize=None if quantize is None else quantize.value,
            provider=provider,
            opset=opset,
            progress=status.update,
        )
    print_report(report, output)


def print_report(report: ExportReport, output: Path) -> None:
    """How far the graphs are from PyTorch, and how large they are."""
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
            f"{difference.tolerance:.0e}",
        )
    Console().print(table)
    for name, size in report.sizes.items():
        typer.echo(f"{output}: {name} {human_bytes(size)}")
