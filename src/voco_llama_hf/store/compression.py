"""Images and videos into compressed images that say how they were preprocessed, as a store keeps them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.fingerprint_voco_llama import Fingerprint, with_images
from ..modeling.tiles_voco_llama import read_sizes
from ..pictures import join, name_number
from ..videos import is_video, read_frames
from ..vision_tokens import count_image_tiles
from .content import TILES


@dataclass(frozen=True)
class Sampling:
    """
    What has VoCo tokens of its own: frames of videos, `num_frames` of each or `fps` a second, and images as a whole or
    each of their tiles.
    """

    num_frames: int | None = None
    fps: float | None = None
    per_tile: bool = False

    def of(self, source: str) -> str:
        """What [`Content`] says of a file of this name."""
        if is_video(source):
            return str(self)
        return TILES if self.per_tile else ""

    def __str__(self) -> str:
        return f"num_frames={self.num_frames}" if self.fps is None else f"fps={self.fps:g}"


@dataclass(frozen=True)
class Compression:
    """
    What compresses a whole archive. Its weights stay: they are read once for the fingerprint, by [`fingerprint`].

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): What compresses.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        num_voco_tokens (`int`): VoCo tokens of an image, tile or frame.
        sampling ([`Sampling`]): Which of them, and which frames of videos are taken.
        batch_size (`int`): Images or frames that are compressed at a time.
    """

    model: VoCoLlamaForConditionalGeneration
    processor: VoCoLlamaProcessor
    num_voco_tokens: int
    sampling: Sampling
    batch_size: int

    def fingerprint(self) -> Fingerprint:
        """What all is made by. It reads all weights."""
        return with_images(self.model.fingerprint(), self.processor.image_processor)

    def compress_images(self, pictures: Sequence[dict[str, torch.Tensor]]) -> list[VoCoCache]:
        """What [`~voco_llama_hf.pictures.prepare`] made of some images, each compressed, in CPU memory."""
        joined = join(pictures, self.model.dtype)
        numbers = name_number(self.num_voco_tokens, self.sampling.per_tile)
        cache = self._compress(**joined, **numbers)
        if not self.sampling.per_tile:
            return list(cache)
        tiles = [count_image_tiles(self.model.config, size) for size in read_sizes(joined["image_sizes"])]
        return [cache[end - count : end] for count, end in zip(tiles, accumulate(tiles))]

    def compress_video(self, path: str) -> VoCoCache:
        """
        The frames of a video, an entry each, in CPU memory.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it cannot be decoded.
        """
        frames = self.processor.iter_pixel_values(decode(path, self.sampling), self.batch_size)
        return self._compress(
            (batch.to(self.model.dtype) for batch in frames), num_voco_tokens=self.num_voco_tokens, show_progress=False
        )

    def _compress(self, pixel_values: Any, **options: Any) -> VoCoCache:
        cache = self.model.compress(pixel_values, batch_size=self.batch_size, exact=False, **options).to("cpu")
        cache.fingerprint = with_images(cache.fingerprint, self.processor.image_processor)
        return cache


def decode(path: str, sampling: Sampling) -> Iterator[Any]:
    """
    Frames of a video.

    Raises:
        ValueError: whatever its decoder stumbles over.
    """
    try:
        yield from read_frames(path, sampling.num_frames, sampling.fps)
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


__all__ = ["Compression", "Sampling", "decode"]
