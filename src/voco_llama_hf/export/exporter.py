"""From a model to a folder of ONNX graphs that agree with it."""

import copy
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from PIL import Image
from transformers.exporters import OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from ..files import check_new_folder, new_folder
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .answers import AnswerAgreement, check_answers, check_questions, compare_answers, default_pictures
from .files import COMPRESSOR_FILE, DECODER_FILE, FINGERPRINT, VISION_FILE
from .graphs import COMPRESSOR, DECODER, VISION, Graph, build_graphs, export_graph
from .providers import check_provider, resolve_providers
from .runtime import ORTVoCoLlamaForConditionalGeneration
from .session import TorchSession
from .validation import Difference, check_differences, compare


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
QUANTIZATIONS = ("int8", "int4")
FUSIONS: dict[str | None, Literal["cpu", "cuda"]] = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}
FILES = {VISION: VISION_FILE, COMPRESSOR: COMPRESSOR_FILE, DECODER: DECODER_FILE}


@dataclass
class ExportReport:
    """
    What [`export_onnx`] wrote.

    Args:
        sizes (`dict[str, int]`): Bytes of each graph with its weights.
        differences (`list[Difference]`): How far each graph is from PyTorch, at several sizes of its inputs.
        answers ([`AnswerAgreement`], *optional*): How both answer questions about pictures; None without a processor.
    """

    sizes: dict[str, int]
    differences: list[Difference]
    answers: AnswerAgreement | None


def export_onnx(
    model: VoCoLlamaForConditionalGeneration,
    output: str | os.PathLike,
    processor: VoCoLlamaProcessor | None = None,
    precision: str = "fp32",
    quantize: str | None = None,
    provider: str | None = None,
    opset: int | None = None,
    images: Sequence[Image.Image] | None = None,
    questions: Sequence[str] | None = None,
    atol: float | None = None,
    progress: Callable[[str], object] = lambda step: None,
) -> ExportReport:
    """
    Exports a model as two ONNX graphs, three if it divides images into tiles, runs them against PyTorch, and writes
    them with all that [`ORTVoCoLlamaForConditionalGeneration`] needs.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            The model. It is copied where `precision` is another than its own.
        output (`str` or `os.PathLike`):
            Folder to write, new or empty.
        processor ([`VoCoLlamaProcessor`], *optional*):
            Processor that is saved beside the graphs, and asks the questions that their answers are compared on. A
            quantized export needs it.
        precision (`str`, *optional*, defaults to `"fp32"`):
            `"fp32"`, `"fp16"` or `"bf16"`.
        quantize (`str`, *optional*):
            `"int8"` (dynamic) or `"int4"` (weights only).
        provider (`str`, *optional*):
            Execution provider of ONNX Runtime to fuse the graphs for, and to run them on. By default they are left as
            they are, for every provider, and run on the CPU.
        opset (`int`, *optional*):
            ONNX opset; by default that of the exporter.
        images (`Sequence[PIL.Image.Image]`, *optional*):
            Pictures to ask about; by default two that the package ships.
        questions (`Sequence[str]`, *optional*):
            What to ask about each; by default the package's own questions.
        atol (`float`, *optional*):
            Largest absolute difference from PyTorch that a graph may have; by default 1e-3 in fp32, and any in other
            precisions, whose relative differences are bounded.
        progress (`Callable`, *optional*):
            Called with the name of each step.

    Raises:
        FileExistsError: if `output` holds something.
        ValueError: if an argument is unknown, the model has an adapter that is not merged, the provider is not there,
            a graph differs from PyTorch beyond tolerance, or both answer otherwise than PyTorch. Nothing is written
            then.
    """
    output = Path(output)
    check_model(model)
    running_on = provider or "CPUExecutionProvider"
    check_options(precision, quantize, running_on)
    if processor is None and (quantize is not None or images is not None or questions is not None):
        raise ValueError("the answers of the graphs are compared with PyTorch's, which needs the model's processor")
    pictures = default_pictures() if images is None else list(images)
    if not pictures:
        raise ValueError("images is empty: give at least one, or None for those of the package")
    asked = None if processor is None else check_questions(questions, processor, model.config.voco_token_id)
    check_new_folder(output)

    fingerprint, kind = model.fingerprint(), quantize or precision
    fusions = FUSIONS.get(running_on) if provider else None
    with in_precision(model, PRECISIONS[precision]) as network, new_folder(output) as aside:
        sizes, differences, answers = {}, [], None
        for graph in build_graphs(network):
            progress(f"Exporting the {graph.name}")
            with quiet():
                program = convert(graph, quantize, fusions, opset)
            if graph.name == COMPRESSOR:
                program.metadata_props[FINGERPRINT] = json.dumps(fingerprint)
            path = aside / FILES[graph.name]
            OnnxExporter.save_program(program, path)
            del program
            sizes[graph.name] = sum(file.stat().st_size for file in aside.glob(f"{path.name}*"))
            progress(f"Running the {graph.name} against PyTorch")
            differences += compare(graph, TorchSession(path, resolve_providers(running_on)), kind, atol)
        check_differences(differences)
        config = copy.deepcopy(network.config)
        config.dtype = network.dtype
        config.save_pretrained(aside)
        network.generation_config.save_pretrained(aside)
        if processor is not None and asked is not None:
            processor.save_pretrained(aside)
            progress("Asking both about pictures")
            exported = ORTVoCoLlamaForConditionalGeneration.from_pretrained(aside, provider=running_on)
            answers = compare_answers(network, exported, processor, kind, pictures, asked)
            check_answers(answers, kind)
            del exported
    return ExportReport(sizes, differences, answers)


def check_model(model: object) -> None:
    """
    Raises:
        ValueError: if it is not a [`VoCoLlamaForConditionalGeneration`], above all if an adapter is around it.
    """
    peft = sys.modules.get("peft")  # whoever has such a model has imported it
    if peft is not None and isinstance(model, peft.PeftModel):
        raise ValueError("the model has an adapter around it: merge it first, with model.merge_and_unload()")
    if not isinstance(model, VoCoLlamaForConditionalGeneration):
        raise ValueError(f"export_onnx takes a VoCoLlamaForConditionalGeneration, got a {type(model).__name__}")


def check_options(precision: str, quantize: str | None, provider: str) -> None:
    """
    Raises:
        ValueError: if an option is unknown, not available here, or does not go with the others.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"quantize must be one of {', '.join(QUANTIZATIONS)}, got {quantize!r}")
    check_provider(provider)
    if precision == "bf16" and provider == "CPUExecutionProvider":
        raise ValueError("the CPUExecutionProvider has no bf16 kernels: use fp32, fp16 or the CUDAExecutionProvider")
    if quantize == "int8" and precision != "fp32":
        raise ValueError(f"int8 is quantized from fp32: leave precision at fp32 instead of {precision}")


@contextmanager
def in_precision(
    model: VoCoLlamaForConditionalGeneration, dtype: torch.dtype
) -> Iterator[VoCoLlamaForConditionalGeneration]:
    """The model in evaluation mode and one precision: itself, left as it was, or a copy."""
    if {parameter.dtype for parameter in model.parameters()} != {dtype}:
        copied: Any = copy.deepcopy(model)  # whose `to` transformers annotates as a plain function
        yield copied.to(dtype).eval()
        return
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)


def convert(
    graph: Graph, quantize: str | None, fusions: Literal["cpu", "cuda"] | None, opset: int | None
) -> onnx_ir.Model:
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
