"""An OpenAI-compatible server on transformers' own serving code, with a memory of compressed images."""

import importlib
from typing import TYPE_CHECKING, Any

from .image_cache import ImageCache
from .limits import Limits


if TYPE_CHECKING:
    from .model_manager import VoCoModelManager
    from .server import build_app

MODULES = {"VoCoModelManager": "model_manager", "build_app": "server"}


def __getattr__(name: str) -> Any:
    # The demo has the memory and the bounds in common with the server, and not the extra `serve`
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


__all__ = ["ImageCache", "Limits", "VoCoModelManager", "build_app"]
