import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str:
    """The browser of this machine. Without one the test is skipped, and fails in continuous integration."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        message = f"no browser to look at the page with: none of {', '.join(BROWSERS)} is installed"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def running(*command: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process that says where its page is, and that address."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **environment},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("Open http://"), line
        yield process, line.split()[-1].rstrip("/")
    finally:
        process.terminate()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the demo of the embedded checkpoint is, with small bounds and what an operator may have set wrongly."""
    bounds = ["--max-upload-mb", "1", "--max-megapixels", "1", "--port", str(free_port())]
    with running("-m", "voco_llama_cli", "demo", *bounds, GRADIO_ALLOWED_PATHS="/") as (_, url):
        yield url
