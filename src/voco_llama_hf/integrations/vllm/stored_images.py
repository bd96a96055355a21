"""Compressed images that come instead of pixels: how a client sends them, and what a server makes of them."""

import base64
import io
import logging
import os
import sqlite3
import tempfile
import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...modeling.cache_voco_llama import VoCoCache, check_cache
from ...modeling.fingerprint_voco_llama import Fingerprint, check_fingerprint, with_images
from ...modeling.rotation_voco_llama import rotate_keys


if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from ...modeling import VoCoLlamaProcessor
    from ...store import VoCoStore

STORE_ERRORS = (OSError, ValueError, KeyError, sqlite3.Error)

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's own handler shows what is below `vllm`


def image_part(cache: VoCoCache | str | os.PathLike) -> dict[str, Any]:
    """
    Compressed images as a part of a chat message, for a server that was started with `--enable-mm-embeds`.

    Args:
        cache ([`VoCoCache`], `str` or `os.PathLike`):
            Compressed images, or a file that [`VoCoCache.save`] or `voco-llama compress` wrote. All of them, as frames
            of a video, stand where the part stands.

    Returns:
        `dict`: The part: what the file holds, as an array in base64.

    Example:

    ```python
    >>> content = [image_part("cat.safetensors"), {"type": "text", "text": "What is this?"}]
    >>> client.chat.completions.create(model=model, messages=[{"role": "user", "content": content}])
    ```"""
    if isinstance(cache, VoCoCache):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "cache.safetensors")
            cache.save(path)
            content = path.read_bytes()
    else:
        content = Path(cache).read_bytes()
    array = io.BytesIO()
    np.save(array, np.frombuffer(content, dtype=np.uint8)[None])
    return {"type": "image_embeds", "image_embeds": base64.b64encode(array.getvalue()).decode()}


def read_sent(content: torch.Tensor) -> VoCoCache:
    """
    What [`image_part`] sends.

    Args:
        content (`torch.ByteTensor` of shape `(1, num_bytes)`): The bytes of a file.

    Raises:
        ValueError: if it is no sound file of a [`VoCoCache`].
    """
    if content.dtype != torch.uint8 or content.ndim != 2 or len(content) != 1:
        raise ValueError(
            f"image_embeds are the bytes of a VoCoCache file as an array (1, num_bytes) of uint8, see image_part; got "
            f"{tuple(content.shape)} {content.dtype}"
        )
    with tempfile.TemporaryDirectory() as folder:
        # Without a folder of ours in messages
        path = Path(folder, "image_embeds")
        path.write_bytes(content.numpy().tobytes())
        try:
            return VoCoCache.load(path)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), path.name)) from None


class ServedModel:
    """
    What compressed images must fit. It is read when the first of them comes.

    Args:
        model_config (`vllm.config.ModelConfig`): The model that is served.
    """

    def __init__(self, model_config: "ModelConfig"):
        self._model_config = model_config
        self.config = model_config.hf_config
        self._lock = threading.Lock()

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        # vLLM keeps weights in another form, so that they are read once more, as those who compress have them
        from ...loading import load_model

        revision = self._model_config.revision or "main"
        return load_model(self._model_config.model, revision=revision, dtype="auto").model.fingerprint()

    def check(self, cache: VoCoCache, processor: "VoCoLlamaProcessor", what: str) -> None:
        """
        Raises:
            ValueError: if images were compressed by another model, or in another way than this one would do it.
        """
        if self._model_config.quantization is not None:
            raise ValueError(
                f"a model that is served with quantization={self._model_config.quantization} takes no compressed "
                "images: they were made by other weights"
            )
        check_cache(cache, self.config, self.fingerprint(processor), "the one that is served", what)

    def fingerprint(self, processor: "VoCoLlamaProcessor") -> Fingerprint:
        """Of the model, and of how its images are preprocessed."""
        with self._lock:
            return with_images(self._fingerprint, processor.image_processor)

    @cached_property
    def _rotary_emb(self) -> Any:  # of whatever class the text model has
        from transformers import AutoModel

        text_config = self.config.text_config
        with torch.device("meta"):
            kind = type(AutoModel.from_config(text_config).rotary_emb)
        return kind(text_config)

    def rows(self, cache: VoCoCache) -> torch.Tensor:
        """
        An image as the model takes it: keys before their rotation and values of every layer,
        `(k, 2 * layers * kv_heads * head_dim)`.
        """
        back = -torch.cat([torch.arange(count) for count in cache.token_counts])
        keys = rotate_keys(cache.keys.float(), back, self._rotary_emb) / self._rotary_emb.attention_scaling
        return torch.stack([keys, cache.values.float()], dim=2).flatten(1)


class StoreReader:
    """
    A [`VoCoStore`] that is only read.

    Args:
        path (`str`): Its folder.
        model ([`ServedModel`]): Who its images must be of.
        processor ([`VoCoLlamaProcessor`]): Processor of that model.

    Raises:
        FileNotFoundError: if there is no store.
        ValueError: if it is damaged, or of another model.
    """

    def __init__(self, path: str, model: ServedModel, processor: "VoCoLlamaProcessor"):
        self._path, self._model = path, model
        self._of_thread = threading.local()  # SQLite ties a connection to its thread
        expected = model.fingerprint(processor)
        check_fingerprint(self._store().fingerprint, expected, "the one that is served", f"the store {path}")

    def find(self, content_hash: str, num_voco_tokens: int, per_tile: bool = False) -> VoCoCache | None:
        """An image by the SHA-256 of its file, if it is stored at this k, or k for every tile, and can be read."""
        from ...store.content import TILES

        key = content_hash, num_voco_tokens, TILES if per_tile else ""
        try:
            store = self._store()
            if not store.contains(*key):
                return None
            cache = store.get(*key)
            check_cache(cache, self._model.config, what="the stored image")
        except STORE_ERRORS as error:
            logger.warning("an image cannot be read from the store %s: %s", self._path, error)
            return None
        return cache

    def _store(self) -> "VoCoStore":
        from ...store import VoCoStore

        if not hasattr(self._of_thread, "store"):
            self._of_thread.store = VoCoStore(self._path)
        return self._of_thread.store


__all__ = ["ServedModel", "StoreReader", "image_part", "read_sent"]
