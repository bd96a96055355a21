"""Export to ONNX, and the model on ONNX Runtime. Needs the extra `export` or `export-gpu`."""

from importlib.util import find_spec


if any(find_spec(module) is None for module in ("onnx", "onnxruntime", "onnxscript")):
    raise ImportError(
        "voco_llama_hf.export needs the extra export (or export-gpu): pip install 'voco-llama-hf[export]'"
    )

from .exporter import ExportReport, export_onnx
from .runtime import ORTVoCoLlamaForConditionalGeneration


__all__ = ["ExportReport", "ORTVoCoLlamaForConditionalGeneration", "export_onnx"]
