"""A memory of compressed images: compress an archive once, then ask it anything."""

from .content import Content, hash_file, hash_pixels
from .store import Entry, VoCoStore


__all__ = ["Content", "Entry", "VoCoStore", "hash_file", "hash_pixels"]
