"""An OpenAI-compatible server with a memory of compressed images."""

import importlib
from typing import TYPE_CHECKING, Any

from .image_cache import ImageCache
from .limits import Limits


if TYPE_CHECKING:
    from .listening import build_server
    from .server import build_app

MODULES = {"build_app": "server", "build_server": "listening"}


def __getattr__(name: str) -> Any:
    # The demo has the memory and the bounds in common with the server, and not the extra `serve`
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


__all__ = ["ImageCache", "Limits", "build_app", "build_server"]
