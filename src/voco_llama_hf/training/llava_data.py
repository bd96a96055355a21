"""LLaVA's own data format: a JSON list of conversations, and a folder of images and videos."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ijson
from datasets import IterableDataset

from ..images import open_image
from ..videos import read_frames


logger = logging.getLogger(__name__)

IMAGE, VIDEO = "<image>", "<video>"
KINDS = {IMAGE: "image", VIDEO: "video"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def load_llava_data(
    path: str | Path,
    image_folder: str | Path | None = None,
    max_bad_rows: int = 100,
    shuffle_buffer_size: int = 0,
    seed: int = 0,
    num_frames: int = 8,
) -> IterableDataset:
    """
    Streams a file in LLaVA's format: neither the file nor its images are ever in memory as a whole.

    A row has `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and where its text says `<image>`
    or `<video>`, as many `image` and `video` paths (one string, or a list). Rows that cannot be read are reported by
    their number, counted and left out.

    Args:
        path (`str` or `Path`):
            A `.json` file with a list, or a `.jsonl` file with a row a line.
        image_folder (`str` or `Path`, *optional*):
            Folder the paths of images and videos start from; that of the file by default.
        max_bad_rows (`int`, *optional*, defaults to 100):
            How many rows may be left out.
        shuffle_buffer_size (`int`, *optional*, defaults to 0):
            Rows (without their images) that are held in memory to be drawn from; 0 keeps the order of the file.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order.
        num_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video.

    Returns:
        [`~datasets.IterableDataset`] with the columns `messages`, whose video parts hold their frames, and `images`.

    Raises:
        FileNotFoundError: if the file or the folder does not exist.
        ValueError: if the file is neither a JSON list nor JSON lines; while reading, if more than `max_bad_rows` rows
            cannot be read.
    """
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such image folder: {folder}")
    next(read_rows(path), None)
    rows = IterableDataset.from_generator(read_rows, gen_kwargs={"path": path})
    if shuffle_buffer_size > 0:
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
    reader = RowReader(path.name, folder, max_bad_rows, num_frames)
    return rows.map(reader, batched=True, batch_size=1, remove_columns=["number", "row"])


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file with their numbers, from 1 on, without their images."""
    with open(path, "rb") as file:
        lines = path.suffix == ".jsonl"
        rows = map(json.loads, filter(bytes.strip, file)) if lines else ijson.items(file, "item", use_float=True)
        number = 0
        try:
            for number, row in enumerate(rows, start=1):
                yield {"number": number, "row": row}
        except (ijson.JSONError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged behind row {number}: {error}") from error
        if number == 0:
            raise ValueError(f"{path} has no rows: expected {'JSON lines' if lines else 'a JSON list'}")


@dataclass
class RowReader:
    """
    Turns rows into messages and images, and leaves out what cannot be read.

    Args:
        name (`str`): What the rows are called in reports.
        image_folder (`Path`): Folder the paths of images and videos start from.
        max_bad_rows (`int`): How many rows may be left out.
        num_frames (`int`): Frames sampled from a video.
    """

    name: str
    image_folder: Path
    max_bad_rows: int
    num_frames: int
    num_bad_rows: int = 0

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        read: dict[str, list] = {"messages": [], "images": []}
        for number, row in zip(batch["number"], batch["row"], strict=True):
            try:
                messages, images = read_row(row, self.image_folder, self.num_frames)
            except (ValueError, OSError) as error:
                self._report(number, error)
                continue
            read["messages"].append(messages)
            read["images"].append(images)
        return read

    def _report(self, number: int, error: Exception) -> None:
        self.num_bad_rows += 1
        logger.warning(f"{self.name}, row {number} is left out: {error} ({self.num_bad_rows} so far)")
        if self.num_bad_rows > self.max_bad_rows:
            raise ValueError(
                f"more than {self.max_bad_rows} rows of {self.name} cannot be read, the last is row {number}: {error}"
            ) from error


def read_row(row: Any, image_folder: Path, num_frames: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Messages, in the format of chat templates, and images of a row.

    Raises:
        ValueError: if roles, `<image>`, `<video>` and files do not fit together, or a file is damaged.
        FileNotFoundError: if an image or a video does not exist.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise ValueError("it has no conversations")
    messages = [read_turn(turn) for turn in row["conversations"]]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise ValueError(f"human and gpt do not take turns: {', '.join(roles)}")
    parts = [part for message in messages for part in message["content"]]
    images, videos = (find_paths(row, parts, kind) for kind in ("image", "video"))
    for part, path in zip((part for part in parts if part["type"] == "video"), videos, strict=True):
        part["video"] = list(read_frames(image_folder / path, num_frames))
    return messages, [open_image(image_folder / path) for path in images]


def find_paths(row: dict[str, Any], parts: list[dict[str, Any]], kind: str) -> list[str]:
    """
    Paths of the images or the videos of a row.

    Raises:
        ValueError: if they are not as many as its text asks for.
    """
    paths = row.get(kind) or row.get(f"{kind}s") or []
    paths = [paths] if isinstance(paths, str) else paths
    num_parts = sum(part["type"] == kind for part in parts)
    if num_parts != len(paths):
        raise ValueError(f"it says <{kind}> {num_parts} times, but has {len(paths)} {kind}s")
    return paths


def read_turn(turn: Any) -> dict[str, Any]:
    """One message, its text cut into parts of text, images and videos."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"a turn is no {{'from': ..., 'value': ...}}: {str(turn)[:80]}")
    role = ROLES.get(turn.get("from", ""))
    if role is None:
        raise ValueError(f"a turn is from {turn.get('from')!r}, expected human or gpt")
    pieces = re.split(f"({'|'.join(KINDS)})", turn["value"])
    texts = [piece.strip() if len(pieces) > 1 else piece for piece in pieces]
    parts = [{"type": KINDS[text]} if text in KINDS else {"type": "text", "text": text} for text in texts if text]
    return {"role": role, "content": parts}


__all__ = ["load_llava_data"]
