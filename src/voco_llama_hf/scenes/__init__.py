"""Our own world of drawn scenes, still and moving: what the embedded checkpoint was trained on and is measured by."""

import importlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .evaluation import ScenesResults, evaluate_scenes
    from .moving import make_clips
    from .still import make_scenes
    from .video_evaluation import VideoResults, evaluate_videos

MODULES = {
    "ScenesResults": "evaluation",
    "VideoResults": "video_evaluation",
    "evaluate_scenes": "evaluation",
    "evaluate_videos": "video_evaluation",
    "make_clips": "moving",
    "make_scenes": "still",
}


def __getattr__(name: str) -> object:
    # Data sets and plots take seconds to import
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


__all__ = ["ScenesResults", "VideoResults", "evaluate_scenes", "evaluate_videos", "make_clips", "make_scenes"]
