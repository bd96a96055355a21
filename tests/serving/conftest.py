import base64
import io
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image, ImageDraw

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.serving import build_app, build_server


MODEL = "voco-scenes-tiny"
# A process of its own, which does not wait for the threads of the tests
HEALTH = """
import http.client, sys, time
host, port = sys.argv[1].split(":")
print("ready", flush=True)
while True:
    start = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=600)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    print(status, time.perf_counter() - start, flush=True)
    time.sleep(0.02)
"""


class Server:
    """`voco-llama serve` in a process of its own."""

    def __init__(self, *args: str):
        command = [sys.executable, "-m", "voco_llama_cli", "serve", "--port", "0", *map(str, args)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self.url = self.process.stdout.readline().split()[-1]
        self.host, port = self.url.removeprefix("http://").removesuffix("/v1").split(":")
        self.port = int(port)

    def client(self, **options) -> OpenAI:
        return client_of(self.url, **options)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.process.stdout.close()


# Nothing but threads that answer
IDLE = """
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Idle(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
server = ThreadingHTTPServer(("127.0.0.1", 0), Idle)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextmanager
def asking_for_health(*urls: str) -> Iterator[list[list[float]]]:
    """Seconds that `/health` takes at each of some servers, over and over, meanwhile; known at the end."""
    addresses = [url.removeprefix("http://").removesuffix("/v1") for url in urls]
    commands = [[sys.executable, "-c", HEALTH, address] for address in addresses]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    seconds: list[list[float]] = []
    try:
        yield seconds
    finally:
        for process in processes:
            process.terminate()
            lines = [line.split() for line in process.communicate()[0].splitlines()]
            seconds.append([float(line[1]) for line in lines if len(line) == 2])
            assert {line[0] for line in lines} <= {"200"}


@pytest.fixture(scope="session")
def idle() -> Iterator[str]:
    """A server that has nothing else to do: what it takes to answer is the machine's."""
    command = [sys.executable, "-u", "-c", IDLE]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    process.terminate()
    process.communicate()


@pytest.fixture(scope="session")
def embedded() -> tuple[VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor]:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT)
    return model.eval(), VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)


@contextmanager
def serving(*args: str) -> Iterator[Server]:
    server = Server(*args)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The embedded checkpoint with small bounds."""
    bounds = ["--max-request-mb", "4", "--max-megapixels", "1", "--max-images", "4", "--max-queue", "40"]
    with serving(*bounds) as running:
        yield running


@contextmanager
def in_process(model, processor, **options) -> Iterator[tuple[Any, str]]:
    """A server in this process: its application, and its URL."""
    app = build_app(model, processor, MODEL, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = build_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield app, f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def client_of(url: str, **options) -> OpenAI:
    return OpenAI(base_url=url, **{"api_key": "none", "max_retries": 0, "timeout": 300, **options})


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
