"""Images and videos into compressed images that say how they were preprocessed, as a store keeps them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.fingerprint_voco_llama import Fingerprint, with_images
from ..pictures import join
from ..videos import read_frames


@dataclass(frozen=True)
class Sampling:
    """How frames of videos are chosen: `num_frames` of each, or `fps` a second."""

    num_frames: int | None = None
    fps: float | None = None

    def __str__(self) -> str:
        return f"num_frames={self.num_frames}" if self.fps is None else f"fps={self.fps:g}"


@dataclass(frozen=True)
class Compression:
    """
    What compresses a whole archive. Its weights stay: they are read once for the fingerprint, by [`fingerprint`].

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): What compresses.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        num_voco_tokens (`int`): VoCo tokens of an image or frame.
        sampling ([`Sampling`]): Which frames of videos are taken.
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

    def compress_images(self, pictures: Sequence[dict[str, torch.Tensor]]) -> VoCoCache:
        """What [`~voco_llama_hf.pictures.prepare`] made of some images, an entry each, in CPU memory."""
        return self._compress(**join(pictures, self.model.dtype))

    def compress_video(self, path: str) -> VoCoCache:
        """
        The frames of a video, an entry each, in CPU memory.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it cannot be decoded.
        """
        frames = self.processor.iter_pixel_values(decode(path, self.sampling), self.batch_size)
        return self._compress((batch.to(self.model.dtype) for batch in frames), show_progress=False)

    def _compress(self, pixel_values: Any, **options: Any) -> VoCoCache:
        cache = self.model.compress(
            pixel_values,
            num_voco_tokens=self.num_voco_tokens,
            batch_size=self.batch_size,
            exact=False,
            **options,
        ).to("cpu")
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
