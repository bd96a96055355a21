"""The results of a stage: a JSON file that is whole after every part, from which a second run goes on."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any

from .machine import machine


PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
# What a second run must have in common with the first, whose results it keeps
SAME = ("card", "driver", "model", "dry_run")
SAME_VERSIONS = ("voco-llama-hf", "torch", "transformers")


class Missing(Exception):
    """What a part needs is not here; the message says what."""


class Failed(Exception):
    """What a part measured is not what it should be."""

    def __init__(self, reason: str, result: Any = None):
        super().__init__(reason)
        self.result = result


def read(path: Path) -> dict[str, Any]:
    """A file of results; empty if there is none, or it was damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write(path: Path, record: dict[str, Any]) -> None:
    """Writes all or nothing. Not with the package's own function, which takes the runner seconds to import."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(record, indent=2, default=to_plain) + "\n")
    part.replace(path)


def to_plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def about(model: str | None, dry_run: bool, command: str) -> dict[str, Any]:
    """The head of a file of results."""
    settings = {"model": model, "dry_run": dry_run}
    return {"date": date.today().isoformat(), "command": command, **machine(dry_run), **settings}


def is_of(record: dict[str, Any], head: dict[str, Any]) -> bool:
    """Whether results were measured with what is here now."""
    before = record.get("versions", {})
    return all(record.get(name) == head[name] for name in SAME) and all(
        before.get(name) == head["versions"].get(name) for name in SAME_VERSIONS
    )


def first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}"[:300] if lines else type(error).__name__


class Parts:
    """
    The parts of a stage, run one after the other. What passed before is not run again.

    Args:
        path (`Path`): The file of results.
        head (`dict`): See [`about`].
        again (`bool`): Whether failed and skipped parts of the file are those of this very run, and are kept.
    """

    def __init__(self, path: Path, head: dict[str, Any], again: bool = False):
        self.path = path
        found = read(path)
        kept = found.get("parts", {}) if is_of(found, head) else {}
        self.done = {name: part for name, part in kept.items() if again or part["status"] == PASSED}
        self.head = head

    def run(self, name: str, measure: Callable[[], Any]) -> None:
        """Runs a part, unless it is done, and writes what it returned, why it failed, or what is missing."""
        if name in self.done:
            return
        self._write(running=name)
        start = time.monotonic()
        part: dict[str, Any] = {}
        try:
            part = {"status": PASSED, "result": measure()}
        except Missing as error:
            part = {"status": SKIPPED, "reason": str(error)}
        except Failed as error:
            part = {"status": FAILED, "reason": str(error), "result": error.result}
        except Exception as error:  # whatever does not run here is what is to be found out
            traceback.print_exc()  # into the log
            part = {"status": FAILED, "reason": first_line(error)}
        ended = {"date": self.head["date"], "seconds": round(time.monotonic() - start, 1)}
        self.done[name] = {**part, **ended}
        self._write()

    def _write(self, running: str | None = None) -> None:
        write(self.path, {**self.head, "running": running, "parts": self.done})
