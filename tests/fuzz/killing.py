"""Processes that are killed at the n-th of their writes."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch


CALLS = (
    "write",
    "pwrite64",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "unlinkat",
    "mkdir",
    "rmdir",
    "ftruncate",
    "chmod",
)
EVENTS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}
STRACE = shutil.which("strace")


def kill_at_events(action: Callable[[], None], folder: Path, step: int = 1) -> Iterator[bool]:
    """Kills a process at every `step`-th thing that it does to a file in a folder, or says to SQLite, till it ends."""
    number = 1
    while _run(action, partial(kill_myself_at, number, folder)):
        yield True
        number += step


def kill_at_calls(action: Callable[[], None], step: int = 1) -> Iterator[bool]:
    """
    The same at its system calls, those of SQLite among them. strace counts each kind for itself: each ends with a
    process that is not killed, which is told too, so that the next kind finds everything as it was.
    """
    for call in CALLS:
        number = 1
        while _run_traced(action, f"inject={call}:signal=KILL:when={number}"):
            yield True
            number += step
        yield False


def _run_traced(action: Callable[[], None], injection: str) -> bool:
    with tempfile.NamedTemporaryFile() as log:
        calls = f"trace=getppid,{','.join(CALLS)}"
        command = [STRACE, "-f", "-q", "-o", log.name, "-e", calls, "-e", injection, "-p"]
        return _run(action, partial(_wait_for_strace, Path(log.name)), command)


def _run(action: Callable[[], None], prepare: Callable[[], None], strace: list[str] | None = None) -> bool:
    """Whether the process was killed before it was done."""
    if (pid := os.fork()) == 0:
        try:
            torch.set_num_threads(1)  # the others have not come along, and OpenMP would wait for them
            prepare()
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    tracer = None
    if strace is not None:
        tracer = subprocess.Popen([*strace, str(pid)], stderr=subprocess.DEVNULL)
    status = os.waitpid(pid, 0)[1]
    if tracer is not None:
        tracer.wait(60)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


def _wait_for_strace(log: Path) -> None:
    """Until it has written down a call of this process."""
    for _ in range(60_000):
        os.getppid()
        if "getppid" in log.read_text():
            return
        time.sleep(0.001)
    raise TimeoutError("strace did not come")


def kill_myself_at(number: int, folder: Path) -> None:
    left = number

    def tick(*args: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS or (event == "open" and str(args[0]).startswith(str(folder))):
            tick()

    sync = os.fsync

    def fsync(handle: int) -> None:
        tick()
        sync(handle)

    connect = sqlite3.connect

    def traced(*args: Any, **options: Any) -> sqlite3.Connection:
        db = connect(*args, **options)
        db.set_trace_callback(tick)
        return db

    os.fsync, sqlite3.connect = fsync, traced
    sys.addaudithook(hook)
