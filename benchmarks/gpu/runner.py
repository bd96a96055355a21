"""Starts the stages, each in a process of its own that is stopped at its limit, and says how they ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import record
from .record import FAILED, PASSED, SKIPPED
from .stages import DEVICE_IS_LOST, Stage


ROOT = Path(__file__).parents[2]
DRY_RUN_LIMIT = 900  # seconds of a stage, on a machine that does something else besides
GRACE = 10  # seconds between asking a process to end and ending it


@dataclass
class Outcome:
    """How a stage ended: `status` is one of passed, failed and skipped."""

    stage: Stage
    status: str
    reason: str
    seconds: float


class Runner:
    """
    Args:
        output (`Path`): Folder of results and logs.
        work_dir (`Path`): Folder of what stages leave for a second run.
        head (`dict`): See [`about`].
        report (`Callable`): Told what has ended.
    """

    def __init__(self, output: Path, work_dir: Path, head: dict[str, Any], report: Callable[[str], None]):
        self.output, self.work_dir, self.head, self.report = output, work_dir, head, report

    def run(self, stage: Stage) -> Outcome:
        """Runs a stage, unless an earlier run did."""
        path = self.output / f"{stage.name}.json"
        found = record.read(path)
        if record.is_of(found, self.head) and is_done(found):
            return Outcome(stage, PASSED, "in an earlier run", found["seconds"])
        start = time.monotonic()
        # Limits are those of a GPU
        limit = DRY_RUN_LIMIT if self.head["dry_run"] else stage.limit
        ended = self._start(stage, path, limit)
        while ended == DEVICE_IS_LOST and (left := limit - (time.monotonic() - start)) > 0:
            ended = self._start(stage, path, left, "--again")
        found = record.read(path)
        status, reason = judge(found, ended, limit, path.with_suffix(".log"))
        outcome = Outcome(stage, status, reason, round(time.monotonic() - start, 1))
        summary = {"status": status, "reason": reason, "seconds": outcome.seconds}
        record.write(path, {**(found or self.head), **summary})
        return outcome

    def command(self, stage: Stage, path: Path) -> list[str]:
        """What is started."""
        command = [sys.executable, "-m", f"{__package__}.process", stage.name, str(path), self.head["command"]]
        command += [str(self.work_dir), *(["--dry-run"] if self.head["dry_run"] else [])]
        return [*command, *(["--model", self.head["model"]] if self.head["model"] else [])]

    def _start(self, stage: Stage, path: Path, limit: float, *flags: str) -> int | None:
        """Exit code of a process, `None` if it was stopped at the limit."""
        with path.with_suffix(".log").open("a") as log:
            process = subprocess.Popen(
                [*self.command(stage, path), *flags],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.head),
                start_new_session=True,  # so that what it starts is stopped with it
            )
            try:
                return self._watch(process, path, time.monotonic() + limit)
            finally:
                stop(process)

    def _watch(self, process: subprocess.Popen, path: Path, end: float) -> int | None:
        known = set(record.read(path).get("parts", {}))
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            known = self._tell(path, known)
        self._tell(path, known)
        return process.poll()

    def _tell(self, path: Path, known: set[str]) -> set[str]:
        parts = record.read(path).get("parts", {})
        for name, part in parts.items():
            if name not in known:
                reason = f": {part['reason']}" if "reason" in part else ""
                self.report(f"  {path.stem}, {name}: {part['status']} in {part['seconds']:.0f} s{reason}")
        return set(parts)


def environment(head: dict[str, Any]) -> dict[str, str]:
    """
    Of a stage's process. A dry run sees no GPU, compiles nothing, which takes minutes, and has one thread a stage:
    more would wait for each other in operations as small as these.
    """
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    if head["model"] is None or Path(head["model"]).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"  # nothing is needed from there
    if head["dry_run"]:
        variables |= {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    return variables


def stop(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def is_done(found: dict[str, Any]) -> bool:
    """Whether a stage has passed with all of its parts: what was missing may be here now."""
    parts = found.get("parts", {}).values()
    return found.get("status") == PASSED and all(part["status"] == PASSED for part in parts)


def judge(found: dict[str, Any], ended: int | None, limit: float, log: Path) -> tuple[str, str]:
    """Status and reason of a stage by what it wrote and how its process ended."""
    parts, place = found.get("parts", {}), f" in {found['running']!r}" if found.get("running") else ""
    for name, part in parts.items():
        if part["status"] == FAILED:
            return FAILED, f"{name}: {part['reason']}"
    if ended is None:
        return FAILED, f"stopped after {limit:.0f} s{place}; a second run goes on there"
    if ended != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return FAILED, f"ended with code {ended}{place}: {lines[-1][:200] if lines else 'nothing in its log'}"
    skipped = [f"{name}: {part['reason']}" for name, part in parts.items() if part["status"] == SKIPPED]
    if len(skipped) == len(parts):
        return SKIPPED, skipped[0] if skipped else "nothing to do"
    return PASSED, f"without {'; '.join(skipped)}" if skipped else ""
