"""VoCo-LLaMA for Hugging Face: compress an image into one or a few tokens, then ask about it many times."""

from .modeling import (
    VoCoCache,
    VoCoLlamaConfig,
    VoCoLlamaForConditionalGeneration,
    VoCoLlamaModel,
    VoCoLlamaProcessor,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "VoCoCache",
    "VoCoLlamaConfig",
    "VoCoLlamaForConditionalGeneration",
    "VoCoLlamaModel",
    "VoCoLlamaProcessor",
]
