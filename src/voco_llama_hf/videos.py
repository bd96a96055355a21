"""Reading of video files frame by frame: what the processor samples, without holding it all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is named like a video."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def check_video(path: str | os.PathLike, max_pixels: int, max_total_pixels: int) -> None:
    """
    Looks at the packets of a video file without decoding them.

    Args:
        path (`str` or `os.PathLike`):
            File in any format that FFmpeg reads.
        max_pixels (`int`):
            Pixels that a frame may have.
        max_total_pixels (`int`):
            Pixels that all its frames may have together, which is what decoding takes time for.

    Raises:
        ImportError: if the package `av` is not installed.
        ValueError: if the file has no video stream, or more pixels.
    """
    _import_av()
    import av

    frames = 0
    with _opened(path) as container:
        stream = container.streams.video[0]
        width, height = stream.width, stream.height
        if width * height > max_pixels:
            raise ValueError(
                f"{path} is too large: frames of {width}x{height}, at most {max_pixels:,} pixels can be read"
            )
        try:
            for packet in container.demux(stream):
                frames += packet.size > 0
                if frames * max(width * height, 1) > max_total_pixels:
                    raise ValueError(
                        f"{path} is too long: at most {max_total_pixels // (width * height):,} frames of "
                        f"{width}x{height} can be read"
                    )
        except av.FFmpegError as error:
            raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


def read_frames(
    path: str | os.PathLike,
    num_frames: int | None = None,
    fps: float | None = None,
    max_pixels: int | None = None,
) -> Iterator["np.ndarray"]:
    """
    Frames of a video file in time order, decoded one at a time as they are asked for: the same that the processor
    samples. All of them if neither `num_frames` nor `fps` is given.

    Args:
        path (`str` or `os.PathLike`):
            File in any format that FFmpeg reads.
        num_frames (`int`, *optional*):
            Frames to sample evenly, at most what the video has.
        fps (`float`, *optional*):
            Frames a second.
        max_pixels (`int`, *optional*):
            Pixels that a frame may have, wherever in the file it changes its size.

    Returns:
        `Iterator` of `np.ndarray` of shape `(height, width, 3)`, dtype uint8, in RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the package `av` is not installed.
        ValueError: if the file is damaged, has no video stream or one frame only, or the sampling makes no sense.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such video: {path}")
    from transformers.video_utils import VideoMetadata

    from .modeling.video_voco_llama import check_num_frames, sample_frames

    total, rate = _count_frames(path, max_pixels)
    check_num_frames(path, total)
    indices = sample_frames(VideoMetadata(total_num_frames=total, fps=rate), num_frames, fps)
    return _decode_at(path, indices, total, max_pixels)


def _decode_at(path: str | os.PathLike, indices, total: int, max_pixels: int | None) -> Iterator["np.ndarray"]:
    wanted, last, found = set(indices), indices[-1], 0
    for index, frame in takewhile(lambda pair: pair[0] <= last, enumerate(_decode(path, max_pixels))):
        if index in wanted:
            found += 1
            yield frame.to_ndarray(format="rgb24")
    if found < len(wanted):
        raise ValueError(f"{path} is damaged: not all of the {total} frames that it claims can be decoded")


def _decode(path: str | os.PathLike, max_pixels: int | None) -> Iterator:
    import av

    with _opened(path) as container:
        stream = container.streams.video[0]
        if max_pixels is not None:
            stream.codec_context.options = {"max_pixels": str(max_pixels)}
        try:
            yield from container.decode(stream)
        except (av.FFmpegError, ValueError) as error:
            raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


def _count_frames(path: str | os.PathLike, max_pixels: int | None) -> tuple[int, float | None]:
    """Number of frames, counted where the container does not say, and frames a second."""
    _import_av()
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = None if stream.average_rate is None else float(stream.average_rate)
        total = stream.frames
    return total or sum(1 for _ in _decode(path, max_pixels)), rate


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Any]:
    """A container with a video stream."""
    import av

    try:
        container = av.open(os.fspath(path))
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error
    with container:
        if not container.streams.video:
            raise ValueError(f"{path} cannot be decoded as a video: it has no video stream")
        yield container


def _import_av() -> None:
    """
    Raises:
        ImportError: if the package `av` is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise ImportError("videos need the extra video: pip install 'voco-llama-hf[video]'") from None


__all__ = ["check_video", "is_video", "read_frames"]
