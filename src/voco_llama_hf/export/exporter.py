"""From a model to a folder of ONNX graphs that agree with it."""

import copy
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from ..files import check_new_folder, new_folder
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .files import COMPRESSOR_FILE, DECODER_FILE, FINGERPRINT
from .graphs import COMPRESSOR, DECODER, Graph, build_graphs, export_graph
from .session import TorchSession, check_provider
from .validation import Difference, check_differences, compare


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZATIONS = ("int8", "int4")
FUSIONS = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
FILES = {COMPRESSOR: COMPRESSOR_FILE, DECODER: DECODER_FILE}


@dataclass
class ExportReport:
    """
    What [`export_onnx`] wrote.

    Args:
        sizes (`dict[str, int]`): Bytes of each graph with its weights.
        differences (`list[Difference]`): How far each graph is from PyTorch, at several sizes of its inputs.
    """

    sizes: dict[str, int]
    differences: list[Difference]


def export_onnx(
    model: VoCoLlamaForConditionalGeneration,
    output: str | os.PathLike,
    processor: VoCoLlamaProcessor | None = None,
    precision: str = "fp32",
    quantize: str | None = None,
    provider: str | None = None,
    opset: int | None = None,
    progress: Callable[[str], Any] = lambda step: None,
) -> ExportReport:
    """
    Exports a model as two ONNX graphs, runs them against PyTorch, and writes them with all that
    [`ORTVoCoLlamaForConditionalGeneration`] needs.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            The model. It is copied where `precision` is another than its own.
        output (`str` or `os.PathLike`):
            Folder to write, new or empty.
        processor ([`VoCoLlamaProcessor`], *optional*):
            Processor that is saved beside the graphs.
        precision (`str`, *optional*, defaults to `"fp32"`):
            `"fp32"`, `"fp16"` or `"bf16"`.
        quantize (`str`, *optional*):
            `"int8"` (dynamic) or `"int4"` (weights only).
        provider (`str`, *optional*):
            Execution provider of ONNX Runtime to fuse the graphs for, and to run them on. By default they are left as
            they are, for every provider, and run on the CPU.
        opset (`int`, *optional*):
            ONNX opset; by default that of the exporter.
        progress (`Callable`, *optional*):
            Called with the name of each step.

    Raises:
        FileExistsError: if `output` holds something.
        ValueError: if an argument is unknown, the provider is not there, or a graph differs from PyTorch beyond
            tolerance. Nothing is written then.
    """
    output = Path(output)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    running_on = provider or "CPUExecutionProvider"
    check_provider(running_on)
    if precision == "bf16" and running_on == "CPUExecutionProvider":
        raise ValueError("the CPUExecutionProvider has no bf16 kernels: use fp32, fp16 or the CUDAExecutionProvider")
    if quantize == "int8" and precision != "fp32":
        raise ValueError(f"int8 is quantized from fp32: leave precision at fp32 instead of {precision}")
    check_new_folder(output)

    fingerprint = model.fingerprint()
    if model.dtype != PRECISIONS[precision]:
        copied: Any = copy.deepcopy(model)
        model = copied.to(PRECISIONS[precision])
    model.eval()
    sizes, differences = {}, []
    with new_folder(output) as aside:
        for graph in build_graphs(model):
            progress(f"Exporting the {graph.name}")
            with quiet():
                program = convert(graph, quantize, FUSIONS.get(running_on) if provider else None, opset)
            if graph.name == COMPRESSOR:
                program.metadata_props[FINGERPRINT] = json.dumps(fingerprint)
            path = aside / FILES[graph.name]
            OnnxExporter.save_program(program, path)
            del program
            sizes[graph.name] = sum(file.stat().st_size for file in aside.glob(f"{path.name}*"))
            progress(f"Running the {graph.name} against PyTorch")
            differences += compare(graph, TorchSession(path, running_on), quantize or precision)
        check_differences(differences)
        config = copy.deepcopy(model.config)
        config.dtype = model.dtype
        config.save_pretrained(aside)
        model.generation_config.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)
    return ExportReport(sizes, differences)


def convert(graph: Graph, quantize: str | None, fusions: Any, opset: int | None) -> onnx_ir.Model:
    """One graph as ONNX, fused and quantized."""
    quantizer = None
    if quantize == "int8":
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(op_types_to_quantize=["MatMul", "Gemm"]))
    program = export_graph(graph, OnnxConfig(opset_version=opset, ort_fusions=fusions, quantizer=quantizer))
    if quantize == "int4":
        # Sets up logging for the whole process when it is imported
        from .quantization import quantize_to_int4

        return quantize_to_int4(program)
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Without the steps that the exporters print, and their notes about operators that nobody asked for."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
