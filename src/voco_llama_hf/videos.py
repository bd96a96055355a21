"""Reading of video files frame by frame: what the processor samples, without holding it all."""

import os
from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is named like a video."""
    return os.fspath(path).lower().endswith(SUFFIXES)


def read_frames(
    path: str | os.PathLike, num_frames: int | None = None, fps: float | None = None
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

    total, rate = _count_frames(path)
    check_num_frames(path, total)
    indices = sample_frames(VideoMetadata(total_num_frames=total, fps=rate), num_frames, fps)
    return _decode_at(path, indices, total)


def _decode_at(path: str | os.PathLike, indices, total: int) -> Iterator["np.ndarray"]:
    wanted, last, found = set(indices), indices[-1], 0
    for index, frame in takewhile(lambda pair: pair[0] <= last, enumerate(_decode(path))):
        if index in wanted:
            found += 1
            yield frame.to_ndarray(format="rgb24")
    if found < len(wanted):
        raise ValueError(f"{path} is damaged: not all of the {total} frames that it claims can be decoded")


def _decode(path: str | os.PathLike) -> Iterator:
    import av

    try:
        with av.open(os.fspath(path)) as container:
            yield from container.decode(video=0)
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


def _count_frames(path: str | os.PathLike) -> tuple[int, float | None]:
    """Number of frames, counted where the container does not say, and frames a second."""
    try:
        import av
    except ImportError:
        raise ImportError("videos need the extra video: pip install 'voco-llama-hf[video]'") from None
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            rate = None if stream.average_rate is None else float(stream.average_rate)
            total = stream.frames
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error
    return total or sum(1 for _ in _decode(path)), rate


__all__ = ["is_video", "read_frames"]
