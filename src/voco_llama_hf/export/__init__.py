"""Export to ONNX, and the model on ONNX Runtime. Needs the extra `export` or `export-gpu`."""

from .exporter import ExportReport, export_onnx
from .runtime import ORTVoCoLlamaForConditionalGeneration


__all__ = ["ExportReport", "ORTVoCoLlamaForConditionalGeneration", "export_onnx"]
