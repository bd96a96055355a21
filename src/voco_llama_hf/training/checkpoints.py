"""Checkpoints that a training has left, some of them perhaps half-written."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last whole checkpoint that a trainer has left in `folder`, if there is one; says which ones are skipped."""
    if not Path(folder).is_dir():
        return None
    names = [re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in Path(folder).iterdir()]
    for name in sorted(filter(None, names), key=lambda name: int(name[1]), reverse=True):
        checkpoint = Path(folder) / name[0]
        problem = find_problem(checkpoint)
        if problem is None:
            return str(checkpoint)
        logger.warning(f"{checkpoint} is skipped, it is not whole: {problem}")
    return None


def check_checkpoint(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: if there is no whole checkpoint in the folder `checkpoint`.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(f"there is no checkpoint {checkpoint}")
    problem = find_problem(Path(checkpoint))
    if problem is not None:
        raise ValueError(f"the checkpoint {checkpoint} is not whole: {problem}")


def find_problem(checkpoint: Path) -> str | None:
    """What a checkpoint lacks, if it lacks something. Its files are looked at from the outside, however large."""
    # Written when all else is
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{TRAINER_STATE_NAME} is missing"
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and not is_whole(path):
            return f"{path.name} breaks off"
    return None


def is_whole(path: Path) -> bool:
    """Whether a file is as long as it says itself."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".bin", ".pt", ".pth"):
            return zipfile.is_zipfile(path)
    except (SafetensorError, ValueError):
        return False
    return True


__all__ = ["check_checkpoint", "last_checkpoint"]
