"""Export to ONNX, and the model on ONNX Runtime. Needs the extra `export` or `export-gpu`, and transformers 5.23."""

from importlib.util import find_spec

from transformers.utils.versions import require_version


if any(find_spec(module) is None for module in ("onnx", "onnxruntime", "onnxscript")):
    raise ImportError(
        "voco_llama_hf.export needs the extra export (or export-gpu): pip install 'voco-llama-hf[export]'"
    )
# The first one whose exporters write the graphs that are read here
require_version("transformers>=5.23", "voco_llama_hf.export needs it: pip install 'transformers>=5.23'")

from .answers import AnswerAgreement  # noqa: E402
from .exporter import ExportReport, export_onnx  # noqa: E402
from .runtime import ORTVoCoLlamaForConditionalGeneration  # noqa: E402


__all__ = ["AnswerAgreement", "ExportReport", "ORTVoCoLlamaForConditionalGeneration", "export_onnx"]
