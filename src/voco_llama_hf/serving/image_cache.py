"""Compressed images that were seen before, by the hash of their content."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from ..modeling import VoCoCache
from ..store import Content, VoCoStore


IMAGE = ""  # the sampling of what is no video


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
        self._entries: OrderedDict[tuple[str, int], VoCoCache] = OrderedDict()
        self._lock = Lock()
        self._store_path, self._fingerprint = store, fingerprint
        self._store: VoCoStore | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, content_hash: str, num_voco_tokens: int) -> VoCoCache | None:
        """An image that is in memory."""
        key = content_hash, num_voco_tokens
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def get_or_compress(
        self, content_hash: str, num_voco_tokens: int, compress: Callable[[], VoCoCache]
    ) -> tuple[VoCoCache, bool]:
        """
        An image from memory, from the store, or compressed now. To be called from one and the same thread always,
        which is the only one that uses the store.

        Returns:
            `tuple[VoCoCache, bool]`: The image, and whether it was known.
        """
        if (known := self.get(content_hash, num_voco_tokens)) is not None:
            return known, True
        store = self.open_store()
        if store is not None and store.contains(content_hash, num_voco_tokens, IMAGE):
            cache = store.get(content_hash, num_voco_tokens, IMAGE)
            self._put(content_hash, num_voco_tokens, cache)
            return cache, True
        cache = compress().to("cpu")
        self._put(content_hash, num_voco_tokens, cache)
        if store is not None:
            store.add([Content(content_hash)], [cache])
        return cache, False

    def _put(self, content_hash: str, num_voco_tokens: int, cache: VoCoCache) -> None:
        with self._lock:
            self._entries[content_hash, num_voco_tokens] = cache
            self.nbytes += cache.nbytes
            while self.nbytes > self.max_bytes:
                self.nbytes -= self._entries.popitem(last=False)[1].nbytes

    def open_store(self) -> VoCoStore | None:
        """The store, opened by the thread that uses it: SQLite ties a connection to its thread."""
        if self._store is None and self._store_path is not None:
            self._store = VoCoStore(self._store_path, self._fingerprint)
        return self._store


def hash_bytes(content: bytes) -> str:
    """What [`~voco_llama_hf.store.hash_file`] says of a file with this content."""
    return hashlib.sha256(content).hexdigest()


__all__ = ["ImageCache", "hash_bytes"]
