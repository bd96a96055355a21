"""A memory of compressed images: compress an archive once, then ask it anything."""

from .content import Content, hash_file, hash_pixels
from .errors import DamagedError, NotWritableError
from .store import Entry, VoCoStore


__all__ = ["Content", "DamagedError", "Entry", "NotWritableError", "VoCoStore", "hash_file", "hash_pixels"]
