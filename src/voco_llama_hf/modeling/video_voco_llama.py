"""Videos as lists of frames: decoding and sampling through transformers' video utilities."""

import math
import os
from collections.abc import Callable
from typing import Any

from transformers.utils import is_av_available
from transformers.video_utils import (
    VideoInput,
    VideoMetadata,
    default_sample_indices_fn,
    is_valid_video_frame,
    load_video,
)


def sample_frames(metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None) -> Any:
    """
    Which frames of a video to look at: `num_frames` of them evenly, or `fps` a second, never more than there are. All
    of them if neither is given.

    Args:
        metadata ([`~transformers.video_utils.VideoMetadata`]):
            What is known about the video: its number of frames and, for `fps`, its frames per second.

    Returns:
        `np.ndarray`: Ascending indices of frames.

    Raises:
        ValueError: if both are given, one of them is not above 0, or `fps` is asked of frames without a rate.
    """
    check_sampling(num_frames, fps)
    if fps is not None:
        if not metadata.fps:
            raise ValueError("fps needs a video that says how fast it is: pass num_frames for a list of frames")
        num_frames = max(1, int(metadata.total_num_frames / metadata.fps * fps))
    if num_frames is not None:
        num_frames = min(num_frames, metadata.total_num_frames)
    return default_sample_indices_fn(metadata, num_frames=num_frames)


def check_sampling(num_frames: int | None, fps: float | None) -> None:
    """
    Raises:
        ValueError: if both are given, or one of them is not above 0.
    """
    if num_frames is not None and fps is not None:
        raise ValueError("num_frames and fps are mutually exclusive: pass one of them")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if fps is not None and not fps > 0:
        raise ValueError(f"fps must be above 0, got {fps}")


def check_num_frames(path: str | os.PathLike, total: int) -> None:
    """
    Raises:
        ValueError: if a file is a still image, or has nothing in it.
    """
    if total == 0:
        raise ValueError(f"{path} has no frames that can be decoded")
    if total == 1:
        raise ValueError(f"{path} has one frame only: pass it as an image")


def load_videos(
    videos: VideoInput,
    num_frames: int | None = None,
    fps: float | None = None,
    do_sample_frames: bool | None = None,
    default_num_frames: int | None = None,
) -> list[list]:
    """
    Frames of each video.

    Args:
        videos (`VideoInput`):
            What transformers takes for videos: paths, URLs, arrays `(num_frames, height, width, 3)` or with channels
            first, lists of frames, lists of lists of paths of frames; one of them or a list.
        num_frames, fps (`int` and `float`, *optional*):
            See [`sample_frames`].
        do_sample_frames (`bool`, *optional*):
            `False` takes every frame. By default files are sampled, and frames when `num_frames` is given.
        default_num_frames (`int`, *optional*):
            Frames to sample from a file when nothing else is said.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a file is damaged, has no video stream or one frame only, or the frames cannot be sampled so.
    """
    if do_sample_frames is False:
        num_frames = fps = default_num_frames = None
    check_sampling(num_frames, fps)
    in_files = default_num_frames if num_frames is None and fps is None else num_frames
    return [
        _decode(clip, in_files, fps) if isinstance(clip, str) else _sample(clip, num_frames, fps)
        for clip in _flatten(videos)
    ]


def _flatten(videos: Any, depth: int = 0) -> list:
    """One path or one list of frames a video, whatever lists they came in."""
    if isinstance(videos, (str, os.PathLike)):
        return [os.fspath(videos)]
    if is_valid_video_frame(videos):
        return [[videos]]
    if not isinstance(videos, (list, tuple)):
        if getattr(videos, "ndim", 0) not in (4, 5):
            raise ValueError(
                "a video is a path, a list of frames or an array (num_frames, height, width, 3), got "
                f"{type(videos).__name__} {tuple(getattr(videos, 'shape', ()))}"
            )
        return [list(videos)] if videos.ndim == 4 else [list(video) for video in videos]
    # A chat has its videos in a list of lists, where another list of paths is one of frames
    if videos and (all(map(is_valid_video_frame, videos)) or (depth == 2 and isinstance(videos[0], str))):
        return [list(videos)]
    return [clip for video in videos for clip in _flatten(video, depth + 1)]


def _sample(frames: list, num_frames: int | None, fps: float | None) -> list:
    indices = sample_frames(VideoMetadata(total_num_frames=len(frames)), num_frames, fps)
    return [frames[index] for index in indices]


class _FrameCounter:
    """Indices that let the decoder run through a whole video, and keep its first frame only."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, index: int) -> float:
        return math.inf  # the last one, behind which the decoder stops

    def __contains__(self, index: int) -> bool:
        self.count = index + 1
        return index == 0


def _decode(path: str, num_frames: int | None, fps: float | None) -> list:
    """Sampled frames of a file or URL, each `(height, width, 3)` in RGB."""
    if not path.startswith(("http://", "https://")) and not os.path.isfile(path):
        raise FileNotFoundError(f"no such video: {path}")
    if not is_av_available():
        raise ImportError("decoding a video needs the package av: pip install av")
    counter = _FrameCounter()

    def sample(metadata: VideoMetadata) -> Any:
        metadata.total_num_frames = metadata.total_num_frames or counter.count
        return sample_frames(metadata, num_frames, fps) if metadata.total_num_frames else counter

    frames, metadata = _load(path, sample)
    if counter.count:  # many containers do not say how many frames they have
        frames, metadata = _load(path, sample)
    check_num_frames(path, metadata.total_num_frames)
    if len(frames) != len(metadata.frames_indices):
        raise ValueError(
            f"{path} is damaged: not all of the {metadata.total_num_frames} frames that it claims can be decoded"
        )
    return list(frames)


def _load(path: Any, sample_indices_fn: Callable) -> Any:  # a path, which `load_video` takes but is not annotated for
    """Frames and metadata."""
    try:
        return load_video(path, backend="pyav", sample_indices_fn=sample_indices_fn)
    except IndexError:
        raise ValueError(f"{path} has no video stream") from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise ValueError(f"{path} cannot be decoded as a video: {error}") from error


__all__ = ["check_num_frames", "check_sampling", "load_videos", "sample_frames"]
