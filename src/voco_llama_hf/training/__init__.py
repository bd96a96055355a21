"""Training and evaluation; needs the `train` extra."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .evaluation import ScenesResults, evaluate_scenes
    from .sft_config import VoCoSFTConfig
    from .sft_trainer import VoCoDataCollator, VoCoSFTTrainer
    from .video_evaluation import VideoResults, evaluate_videos

MODULES = {
    "ScenesResults": "evaluation",
    "VideoResults": "video_evaluation",
    "VoCoDataCollator": "sft_trainer",
    "VoCoSFTConfig": "sft_config",
    "VoCoSFTTrainer": "sft_trainer",
    "evaluate_scenes": "evaluation",
    "evaluate_videos": "video_evaluation",
}


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import, which evaluation need not wait for
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


__all__ = [
    "ScenesResults",
    "VideoResults",
    "VoCoDataCollator",
    "VoCoSFTConfig",
    "VoCoSFTTrainer",
    "evaluate_scenes",
    "evaluate_videos",
]
