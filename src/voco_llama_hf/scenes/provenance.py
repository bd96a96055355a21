"""What a training is made of, so that nothing that lies in its folder is taken for what it is to make."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ..files import written_aside


MADE_OF = "made_of.json"


def made_of(start: Path | None, *settings: Any) -> dict[str, object]:
    """
    What decides how a training ends.

    Args:
        start (`Path`, *optional*): Folder of the weights that it starts from, if they are not random.
        settings: Dataclasses. Of their fields those are told that are not as they are by default, so that a field that
            is new changes nothing.

    Returns:
        `dict`: as it is in JSON.
    """
    weights = None if start is None else hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()
    told = {f"{type(one).__name__}.{name}": value for one in settings for name, value in tell(one).items()}
    return json.loads(json.dumps({"start": weights, **told}))


def tell(settings: Any) -> dict[str, Any]:
    """Fields of a dataclass that are not as they are by default."""
    values = [(field, getattr(settings, field.name)) for field in fields(settings)]
    changed = {field.name: value for field, value in values if value != field.default}
    return {name: tell(value) if is_dataclass(value) else value for name, value in changed.items()}


def is_made(folder: Path, made: dict[str, object]) -> bool:
    """
    Whether a folder holds what is `made` so.

    Raises:
        ValueError: if it holds something else.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    path = folder / MADE_OF
    found = json.loads(path.read_text()) if path.is_file() else {}
    others = sorted(name for name in {*found, *made} if found.get(name) != made.get(name))
    if others:
        raise ValueError(
            f"{folder} holds a training that differs in {', '.join(others)}: choose another folder, or remove it"
        )
    return True


def claim(folder: Path, made: dict[str, object]) -> None:
    """
    Notes in the folder of a training, that of one that is to go on or a new one, what it is made of.

    Raises:
        ValueError: if it holds something else.
    """
    if not is_made(folder, made):
        folder.mkdir(parents=True, exist_ok=True)
        with written_aside(folder / MADE_OF) as part:
            part.write_text(json.dumps(made, indent=2) + "\n")
