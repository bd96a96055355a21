"""An OpenAI-compatible server on transformers' own serving code, with a memory of compressed images."""

from .image_cache import ImageCache
from .limits import Limits
from .model_manager import VoCoModelManager
from .server import build_app


__all__ = ["ImageCache", "Limits", "VoCoModelManager", "build_app"]
