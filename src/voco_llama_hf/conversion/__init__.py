"""Checkpoints of other formats as VoCo-LLaMA checkpoints."""

from .convert import ConversionReport, convert_checkpoint


__all__ = ["ConversionReport", "convert_checkpoint"]
