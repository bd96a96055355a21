"""Compressed images that were seen before, by the hash of their content."""

import hashlib
import logging
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from ..modeling import VoCoCache
from ..store import Content, VoCoStore
from ..store.content import TILES


WHOLE = ""  # the sampling of an image that has VoCo tokens for all of it
STORE_ERRORS = (OSError, ValueError, KeyError, sqlite3.Error)

logger = logging.getLogger(__name__)


class ImageCache:
    """
    Compressed images in memory, the ones used last; those that are not there may be in a [`VoCoStore`].

    Args:
        max_bytes (`int`):
            Bytes of keys and values to hold.
        store (`Path`, *optional*):
            Folder of a store that is read and written too, so that images outlive the process.
        fingerprint (`dict[str, str]`, *optional*):
            `model.fingerprint()` of the model that compresses.
    """

    def __init__(self, max_bytes: int, store: Path | None = None, fingerprint: dict[str, str] | None = None):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[tuple[str, int, bool], VoCoCache] = OrderedDict()
        self._lock = Lock()
        self._store_path, self._fingerprint = store, fingerprint
        self._store: VoCoStore | None = None
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, content_hash: str, num_voco_tokens: int, per_tile: bool = False) -> VoCoCache | None:
        """An image that is in memory, see [`ImageCache.get_or_compress`]."""
        key = content_hash, num_voco_tokens, per_tile
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def get_or_compress(
        self, content_hash: str, num_voco_tokens: int, compress: Callable[[], VoCoCache], per_tile: bool = False
    ) -> tuple[VoCoCache, bool]:
        """
        An image from memory, from the store, or compressed now. To be called from one and the same thread always,
        which is the only one that uses the store.

        Args:
            content_hash (`str`): What it is called.
            num_voco_tokens (`int`): VoCo tokens of it, or of each of its tiles.
            compress (`Callable`): Makes it.
            per_tile (`bool`, *optional*, defaults to `False`): Which of both.

        Returns:
            `tuple[VoCoCache, bool]`: The image, and whether it was known.
        """
        if (known := self.get(content_hash, num_voco_tokens, per_tile)) is not None:
            return known, True
        content = Content(content_hash, TILES if per_tile else WHOLE)
        cache = self._read_stored(content, num_voco_tokens)
        is_known = cache is not None
        if cache is None:
            cache = compress().to("cpu")
            self._write_stored(content, cache)
        self._put((content_hash, num_voco_tokens, per_tile), cache)
        return cache, is_known

    def _read_stored(self, content: Content, num_voco_tokens: int) -> VoCoCache | None:
        """An image from the store; `None` as well if what is there cannot be read, so that it is compressed again."""
        if self._store_path is None:
            return None
        try:
            store = self._open_store(self._store_path)
            key = content.content_hash, num_voco_tokens, content.sampling
            if store.contains(*key):
                return store.get(*key)
        except STORE_ERRORS as error:
            self._warn_once("read from", error)
        return None

    def _write_stored(self, content: Content, cache: VoCoCache) -> None:
        """Puts an image into the store; the answer does not depend on whether it can be."""
        if self._store_path is None:
            return
        try:
            # What is there could not be read, and would be left as it is
            self._open_store(self._store_path).add([content], [cache], replace=True)
        except STORE_ERRORS as error:
            self._warn_once("write to", error)

    def _warn_once(self, doing: str, error: Exception) -> None:
        if doing not in self._warned:
            self._warned.add(doing)
            logger.warning("cannot %s the store %s, and goes on without: %s", doing, self._store_path, error)

    def _put(self, key: tuple[str, int, bool], cache: VoCoCache) -> None:
        with self._lock:
            self._entries[key] = cache
            self.nbytes += cache.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes

    def _open_store(self, path: Path) -> VoCoStore:
        """The store, opened by the thread that uses it: SQLite ties a connection to its thread."""
        if self._store is None:
            self._store = VoCoStore(path, self._fingerprint)
        return self._store


def hash_bytes(content: bytes) -> str:
    """What [`~voco_llama_hf.store.hash_file`] says of a file with this content."""
    return hashlib.sha256(content).hexdigest()


__all__ = ["ImageCache", "hash_bytes"]
