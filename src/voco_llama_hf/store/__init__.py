"""A memory of compressed images: compress an archive once, then ask it anything."""

from .compressor import VoCoCompressor
from .content import Content, hash_file, hash_pixels
from .errors import DamagedError, NotWritableError
from .rows import arrow_schema, cache_from_row
from .store import Entry, VoCoStore


__all__ = [
    "Content",
    "DamagedError",
    "Entry",
    "NotWritableError",
    "VoCoCompressor",
    "VoCoStore",
    "arrow_schema",
    "cache_from_row",
    "hash_file",
    "hash_pixels",
]
