"""What a visitor brings: an image, a short video or a file of compressed images, read within bounds."""

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..images import decode_image
from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.cache_voco_llama import check_cache
from ..modeling.fingerprint_voco_llama import with_images
from ..pictures import join, prepare
from ..serving import Limits
from ..store import hash_file
from ..videos import check_video, is_video, read_frames


SECONDS_OF_FULL_HD = 60
VIDEO_PIXELS = SECONDS_OF_FULL_HD * 30 * 1920 * 1080  # of all its frames together
THUMBNAIL = 320  # pixels a side, at most


@dataclass(frozen=True)
class Source:
    """
    Args:
        path (`str`): Where it was put.
        name (`str`): What the visitor calls it.
        kind (`str`): `"image"`, `"video"` or `"cache"`.
        key (`str`): Its content and whose it is: nobody learns from times what others have brought.
        num_images (`int`): One, or the frames of a video.
        thumbnails (`list[str]`): Data URLs of what is shown; none of a cache, which holds no picture.
        num_voco_tokens (`int`): Of all images of a cache; 0 for what is not compressed yet.
    """

    path: str
    name: str
    kind: Literal["image", "video", "cache"]
    key: str
    num_images: int
    thumbnails: list[str] = field(default_factory=list)
    num_voco_tokens: int = 0


def read_pictures(path: str, limits: Limits, num_frames: int) -> list[Any]:
    """
    An image, or sampled frames of a video.

    Raises:
        ValueError: if it is neither, is damaged or exceeds the limits; the message has the name of the file only.
    """
    name = Path(path).name
    with naming(path):
        check_size(path, limits)
        if not is_video(path):
            return [decode_image(Path(path).read_bytes(), name, limits.max_pixels)]
        check_video(path, limits.max_pixels, VIDEO_PIXELS)
        return list(read_frames(path, num_frames, max_pixels=limits.max_pixels))


def open_picture(path: str, owner: str, limits: Limits, num_frames: int) -> tuple[Source, list[Any]]:
    """The source and its pictures, see [`read_pictures`]."""
    pictures = read_pictures(path, limits, num_frames)
    source = Source(
        path,
        Path(path).name,
        "video" if is_video(path) else "image",
        f"{owner}/{hash_file(path)}",
        len(pictures),
        [thumbnail(picture) for picture in pictures],
    )
    return source, pictures


def load_cache(
    path: str, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, limits: Limits
) -> VoCoCache:
    """
    A file of [`VoCoCache.save`] for this very model and its processor.

    Raises:
        ValueError: if it is none, is damaged, too large, or of another model; the message has the file's name only.
    """
    with naming(path):
        check_size(path, limits)
        cache = VoCoCache.load(path)
        made_for = with_images(model.fingerprint(exact=False), processor.image_processor)
        check_cache(cache, model.config, made_for, "the one shown here", Path(path).name)
        return cache.to(model.dtype)


def open_cache(
    path: str, owner: str, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, limits: Limits
) -> Source:
    """The source; see [`load_cache`]."""
    cache = load_cache(path, model, processor, limits)
    key, name = f"{owner}/{hash_file(path)}", Path(path).name
    return Source(path, name, "cache", key, len(cache), [], sum(cache.token_counts))


def check_size(path: str, limits: Limits) -> None:
    """
    Raises:
        ValueError: if a file is gone or has too many bytes.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not here any more: drop it again")
    if (size := os.path.getsize(path)) > limits.max_request_bytes:
        raise ValueError(f"{path} is too large: {size:,} bytes, at most {limits.max_request_bytes:,} are read")


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Errors with the name of a file in place of where this machine keeps it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace(path, Path(path).name)) from error


def preprocess(
    processor: VoCoLlamaProcessor, pictures: list[Any], kind: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """What `compress` takes, of an `"image"` or of the frames of a `"video"`."""
    if kind == "video":
        return {"pixel_values": torch.cat(list(processor.iter_pixel_values(pictures))).to(dtype)}
    return join([prepare(processor.image_processor, picture) for picture in pictures], dtype)


def thumbnail(picture: Image.Image | np.ndarray) -> str:
    """A data URL of a small copy."""
    image = picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


__all__ = ["Source", "load_cache", "open_cache", "open_picture", "preprocess", "read_pictures"]
