"""What a stored image is known by: the SHA-256 of its bytes, or of its pixels."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_regular
from ..modeling.images_voco_llama import to_rgb


if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image


TILES = "tiles"  # the sampling of an image of which every tile has VoCo tokens of its own
# Modes of Pillow whose numbers are other colours than those of an array of the same shape
OTHER_COLOURS = ("P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "La")


class Sampled:
    """What the sampling of an image or a video tells."""

    sampling: str

    @property
    def is_video(self) -> bool:
        return not self.is_in_tiles and self.sampling != ""

    @property
    def is_in_tiles(self) -> bool:
        """Whether it is an image of which every tile has VoCo tokens of its own."""
        return self.sampling == TILES


@dataclass(frozen=True)
class Content(Sampled):
    """
    An image or a video that goes into a [`VoCoStore`].

    Args:
        content_hash (`str`):
            SHA-256 of its bytes or pixels, in hexadecimal digits.
        sampling (`str`, *optional*, defaults to `""`):
            How the frames of a video were chosen, as in `"num_frames=8"`; `"tiles"` for an image of which every tile
            has VoCo tokens of its own; empty for any other image.
        source (`str`, *optional*, defaults to `""`):
            Where it comes from; what it can be asked for by.
        size (`int`, *optional*, defaults to 0):
            Bytes of the source.
        mtime_ns (`int`, *optional*, defaults to 0):
            When the source was modified, in nanoseconds: one of the same size and time is not read again.
        metadata (`dict`, *optional*):
            Whatever else is to be kept, as JSON.
    """

    content_hash: str
    sampling: str = ""
    source: str = ""
    size: int = 0
    mtime_ns: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_file(cls, path: str | os.PathLike, sampling: str = "", metadata: dict[str, Any] | None = None) -> "Content":
        """
        A file, known by its bytes. Its source is its absolute path.

        Raises:
            ValueError: if it is a folder, a pipe, a socket or a device.
            OSError: if it cannot be read.
        """
        stat = check_regular(path)
        source = str(Path(path).absolute())
        return cls(hash_file(path), sampling, source, stat.st_size, stat.st_mtime_ns, metadata or {})

    @classmethod
    def of_pixels(
        cls,
        pixels: "Image.Image | np.ndarray | torch.Tensor",
        source: str = "",
        metadata: dict[str, Any] | None = None,
    ) -> "Content":
        """An image or array, known by its pixels."""
        return cls(hash_pixels(pixels), source=source, size=_as_array(pixels).nbytes, metadata=metadata or {})


def hash_file(path: str | os.PathLike) -> str:
    """SHA-256 of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_pixels(pixels: "Image.Image | np.ndarray | torch.Tensor") -> str:
    """
    SHA-256 of the pixels of a Pillow image, an array or a tensor, together with shape and dtype. An image of palette
    entries, of another colour space or with one transparent colour is known by what the model sees of it.
    """
    array = _as_array(pixels)
    sha256 = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    sha256.update(array.data)
    return sha256.hexdigest()


def _as_array(pixels: "Image.Image | np.ndarray | torch.Tensor") -> "np.ndarray":
    import numpy as np
    from PIL import Image

    if isinstance(pixels, Image.Image) and (pixels.mode in OTHER_COLOURS or "transparency" in pixels.info):
        pixels = to_rgb(pixels)
    return np.ascontiguousarray(pixels)


__all__ = ["TILES", "Content", "hash_file", "hash_pixels"]
