"""Checkpoints that a training has left."""

from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint


def last_checkpoint(folder: str | Path) -> str | None:
    """The last checkpoint that a trainer has left in `folder`, if there is one."""
    return get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None


__all__ = ["last_checkpoint"]
