"""VoCo-LLaMA for Hugging Face: compress an image into one or a few tokens, then ask about it many times."""

from pathlib import Path

from .modeling import (
    VoCoCache,
    VoCoLlamaConfig,
    VoCoLlamaForConditionalGeneration,
    VoCoLlamaModel,
    VoCoLlamaProcessor,
)


__version__ = "0.1.0"

EMBEDDED_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "voco-scenes-tiny")

__all__ = [
    "EMBEDDED_CHECKPOINT",
    "VoCoCache",
    "VoCoLlamaConfig",
    "VoCoLlamaForConditionalGeneration",
    "VoCoLlamaModel",
    "VoCoLlamaProcessor",
]
