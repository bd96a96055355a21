"""What a task shows: images and videos, known by their content."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from ...modeling.images_voco_llama import load_images, open_image
from ...store.content import hash_file, hash_pixels
from ...videos import is_video, read_frames


Kind = Literal["image", "video"]


@dataclass(frozen=True)
class Visual:
    """
    An image, or a video as some of its frames.

    Args:
        kind (`str`): `"image"` or `"video"`.
        key (`str`): Hash of what it shows, with how the frames were chosen.
        load (`Callable`): Its image, or its frames in time order, as PIL images or arrays in RGB.
    """

    kind: Kind
    key: str
    load: Callable[[], list[Any]]


def as_visual(source: Any, num_frames: int) -> Visual:
    """
    Args:
        source (`PIL.Image.Image`, `str`, `os.PathLike`, `list` or `dict`):
            As tasks of lmms-eval have it: an image, the path of an image or a video, the frames of a video, or a
            dictionary with the `url` or `path` of a video.
        num_frames (`int`): Frames to look at in the file of a video, evenly spaced.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is something else, as sound is.
    """
    if isinstance(source, Image.Image):
        picture = load_images(source, upright=True)[0]
        return Visual("image", hash_pixels(picture), lambda: [picture])
    if isinstance(source, (list, tuple)) and all(isinstance(frame, Image.Image) for frame in source):
        frames = load_images(list(source), upright=True)
        return Visual("video", " ".join(map(hash_pixels, frames)), lambda: frames)
    if isinstance(source, dict) and source.get("type", "video") == "video":
        if "video_start" in source or "video_end" in source:
            raise ValueError("videos are read whole: this task asks about a part of one")
        source = source.get("url") or source.get("path")
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"VoCo-LLaMA reads images and videos, and this task shows {type(source).__name__}")
    path = os.path.expanduser(source)
    if is_video(path):
        return Visual(
            "video", f"{hash_file(path)} num_frames={num_frames}", lambda: list(read_frames(path, num_frames))
        )
    return Visual("image", hash_file(path), lambda: [open_image(path)])


def exchange(
    own: Sequence[Visual], doc_id: int, num_docs: int, visuals_of: Callable[[int], Iterable[Visual]]
) -> list[Visual]:
    """
    What another question of the task shows, in the place of what this one does: as many images and videos, none of
    them its own. It is always the same, however many questions are asked.

    Args:
        own (`Sequence[Visual]`): What the question shows.
        doc_id, num_docs (`int`): Which of how many documents it is.
        visuals_of (`Callable`): What the document of a number shows.

    Raises:
        ValueError: if there is no such question.
    """
    kinds, keys = [visual.kind for visual in own], {visual.key for visual in own}
    if not own:
        return []
    # Half of the data set away: neighbours often ask about the same image
    for step in range(num_docs):
        others = list(visuals_of((doc_id + num_docs // 2 + step) % num_docs))
        if [visual.kind for visual in others] == kinds and keys.isdisjoint(visual.key for visual in others):
            return others
    shown = f"{len(own)} {kinds[0]}{'' if len(own) == 1 else 's'}"
    raise ValueError(f"no other question of the task shows {shown} other than question {doc_id} does")


__all__ = ["Visual", "as_visual", "exchange"]
