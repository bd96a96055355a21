"""VoCo-LLaMA for Hugging Face: compress an image into one or a few tokens, then ask about it many times."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .modeling import (
    VoCoCache,
    VoCoLlamaConfig,
    VoCoLlamaForConditionalGeneration,
    VoCoLlamaModel,
    VoCoLlamaProcessor,
)


if TYPE_CHECKING:
    from .conversion import ConversionReport, convert_checkpoint

__version__ = "0.1.0"

EMBEDDED_CHECKPOINT = str(Path(__file__).parent / "checkpoints" / "voco-scenes-tiny")
# The same scenes at 576 vision tokens an image; no videos
EMBEDDED_CHECKPOINT_576 = str(Path(__file__).parent / "checkpoints" / "voco-scenes-576")


def __getattr__(name: str) -> Any:
    # Models and image processors that nothing but a conversion needs
    if name not in ("ConversionReport", "convert_checkpoint"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import conversion

    return getattr(conversion, name)


__all__ = [
    "EMBEDDED_CHECKPOINT",
    "EMBEDDED_CHECKPOINT_576",
    "ConversionReport",
    "VoCoCache",
    "VoCoLlamaConfig",
    "VoCoLlamaForConditionalGeneration",
    "VoCoLlamaModel",
    "VoCoLlamaProcessor",
    "convert_checkpoint",
]
