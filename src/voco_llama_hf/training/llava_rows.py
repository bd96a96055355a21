"""Rows of LLaVA's own data format: what a file holds, checked, and what of it a collator reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ijson

from ..images import open_image
from ..videos import read_frames


IMAGE, VIDEO = "<image>", "<video>"
KINDS = {IMAGE: "image", VIDEO: "video"}
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_rows(path: Path) -> Iterator[Any]:
    """
    Rows of a file, in which nothing is checked.

    Raises:
        ValueError: if the file is neither a JSON list nor JSON lines, or breaks off.
    """
    with open(path, "rb") as file:
        lines = path.suffix == ".jsonl"
        rows = map(json.loads, filter(bytes.strip, file)) if lines else ijson.items(file, "item")
        number = 0
        try:
            for row in rows:
                number += 1
                yield row
        # Also what is no text at all, and numbers and nesting without end
        except (ijson.JSONError, RecursionError, ValueError) as error:
            raise ValueError(f"{path} is damaged behind row {number}: {error}") from error
        if number == 0:
            raise ValueError(f"{path} has no rows: expected {'JSON lines' if lines else 'a JSON list'}")


def check_row(row: object) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """
    Turns of a row, each a `role` and a `text`, and its paths by kind (`"image"` and `"video"`).

    Raises:
        ValueError: if roles, `<image>`, `<video>` and files do not fit together.
    """
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list) or not row["conversations"]:
        raise ValueError("it has no conversations")
    turns = [_check_turn(turn) for turn in row["conversations"]]
    roles = [turn["role"] for turn in turns]
    spoken = roles[1:] if roles[0] == "system" else roles
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        raise ValueError(f"human and gpt do not take turns: {', '.join(roles)}")
    paths = {kind: _find_paths(row, kind) for kind in KINDS.values()}
    for token, kind in KINDS.items():
        number = sum(turn["text"].count(token) for turn in turns)
        if number != len(paths[kind]):
            raise ValueError(f"it says {token} {number} times, but has {len(paths[kind])} {kind}s")
    return turns, paths


def find_missing(paths: dict[str, list[str]], folder: Path) -> str | None:
    """What to say of the first file that does not exist, if one does not."""
    for kind, names in paths.items():
        for name in names:
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                return f"no such {kind}: {path}"
    return None


def open_row(
    turns: list[dict[str, str]], paths: dict[str, list[str]], folder: Path, num_frames: int
) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Messages, in the format of chat templates and with the frames of videos, and images of a row.

    Raises:
        ValueError: if a file is damaged.
        OSError: if a file cannot be read.
    """
    messages: list[dict[str, Any]] = [{"role": turn["role"], "content": _cut(turn["text"])} for turn in turns]
    shown = [part for message in messages for part in message["content"] if part["type"] == "video"]
    for part, path in zip(shown, paths["video"], strict=True):
        part["video"] = list(read_frames(folder / path, num_frames))
    return messages, [open_image(folder / path) for path in paths["image"]]


def _check_turn(turn: object) -> dict[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"a turn is no {{'from': ..., 'value': ...}}: {str(turn)[:80]}")
    speaker = turn.get("from", "")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise ValueError(f"a turn is from {speaker!r}, expected human or gpt")
    return {"role": ROLES[speaker], "text": _check_text(turn["value"])}


def _find_paths(row: dict[str, Any], kind: str) -> list[str]:
    paths = row.get(kind) or row.get(f"{kind}s") or []
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"its {kind} is no path and no list of paths: {str(paths)[:80]}")
    return [_check_text(path) for path in paths]


def _check_text(text: str) -> str:
    # JSON can spell half of a surrogate pair, which is no character
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text is no Unicode: {error}") from None
    return text


def _cut(text: str) -> list[dict[str, Any]]:
    """A text, cut into parts of text, images and videos."""
    pieces = re.split(f"({'|'.join(KINDS)})", text)
    texts = [piece.strip() if len(pieces) > 1 else piece for piece in pieces]
    parts: list[dict[str, Any]] = [
        {"type": KINDS[text]} if text in KINDS else {"type": "text", "text": text} for text in texts if text
    ]
    # Chat templates look at the first one
    return parts or [{"type": "text", "text": ""}]


__all__ = ["check_row", "find_missing", "open_row", "read_rows"]
