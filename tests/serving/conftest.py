import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from openai import OpenAI
from PIL import Image, ImageDraw


MODEL = "voco-scenes-tiny"


class Server:
    """`voco-llama serve` in a process of its own."""

    def __init__(self, *args: str):
        command = [sys.executable, "-m", "voco_llama_cli", "serve", "--port", "0", *map(str, args)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self.process.stdout.readline().split()[-1]

    def client(self, **options) -> OpenAI:
        return OpenAI(base_url=self.url, api_key="none", **{"max_retries": 0, "timeout": 300, **options})

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@contextmanager
def serving(*args: str) -> Iterator[Server]:
    server = Server(*args)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The embedded checkpoint with small bounds."""
    bounds = ["--max-request-mb", "1", "--max-megapixels", "1", "--max-images", "4", "--max-queue", "40"]
    with serving(*bounds) as running:
        yield running


def scene(colour: str = "red", size: int = 64, mark: int = 0) -> bytes:
    """A PNG of one circle; `mark` changes its content and not its look."""
    image = Image.new("RGB", (size, size), (30, 30, 40))
    ImageDraw.Draw(image).ellipse([0.3 * size, 0.3 * size, 0.7 * size, 0.7 * size], fill=colour)
    image.putpixel((0, 0), (30, 30, 40 + mark))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def ask(question: str, *images: str) -> list[dict]:
    """Messages of one question about images, given as URLs."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
