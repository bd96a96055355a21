"""What every stage is told: at which shape, with which model, where to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar


T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """
    Args:
        dry_run (`bool`): Whether everything is tiny and runs on the CPU.
        model (`str`, *optional*): Folder or Hub id of a model, instead of random weights at LLaVA-1.5-7B's shape.
        work_dir (`Path`): Folder of weights and data that stages leave for a second run.
    """

    dry_run: bool
    model: str | None
    work_dir: Path

    def pick(self, full: T, tiny: T) -> T:
        """The one or, in a dry run, the other."""
        return tiny if self.dry_run else full

    @property
    def device(self) -> str:
        return self.pick("cuda", "cpu")


def report(text: str) -> None:
    """A line for the log, from a library that tells what it does."""
    print(text, flush=True)
