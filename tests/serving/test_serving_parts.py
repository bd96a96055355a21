"""What holds the server together: the memory of images, what may be fetched, and cancelled answers."""

import asyncio
import gzip
import ipaddress
import json
import socket
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling.helpers import build_processor, tiny_model
from serving.conftest import MODEL, client_of, in_process

from voco_llama_hf import VoCoCache
from voco_llama_hf.serving import Limits
from voco_llama_hf.serving.image_cache import ImageCache, hash_bytes
from voco_llama_hf.serving.remote_images import ImageLoader, is_public
from voco_llama_hf.store import hash_file


def entry(num_voco_tokens: int) -> VoCoCache:
    """An image of 64 bytes a token."""
    keys = torch.zeros(num_voco_tokens, 1, 2, 4)
    return VoCoCache(keys, keys, [num_voco_tokens], {"weights": "none"})


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 4)), max_size=40), st.integers(0, 600))
def test_memory_is_bounded_and_keeps_what_was_used_last(asked, max_bytes):
    images = ImageCache(max_bytes)
    reference: list[tuple[str, int]] = []
    for key in asked:
        cache, known = images.get_or_compress(*key, lambda key=key: entry(key[1]))
        assert known == (key in reference)
        assert cache.num_voco_tokens == key[1]
        reference = [*(other for other in reference if other != key), key]
        while sum(64 * k for _, k in reference) > max_bytes:
            reference.pop(0)
        assert images.nbytes == sum(64 * k for _, k in reference) <= max_bytes
        assert len(images) == len(reference)


def test_an_image_has_one_name_here_and_in_a_store(tmp_path):
    (tmp_path / "image").write_bytes(b"content")
    assert hash_bytes(b"content") == hash_file(tmp_path / "image")


def test_public_addresses():
    for address in ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "192.0.1.1", "223.255.255.1"):
        assert is_public(address)
    private = """127.0.0.1 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
        100.127.255.255 192.0.0.1 192.0.0.8 192.0.0.170 192.0.0.192 192.0.2.1 192.88.99.1 198.18.0.1 198.19.255.255
        198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
        :: ::1 ::2 ::127.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:192.0.0.192 ::ffff:0:127.0.0.1
        64:ff9b::7f00:1 64:ff9b::192.0.0.192 64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::808:808 100::1 100:0:0:1::1
        2001::1 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:2::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::
        2002:808:808::1 2002:a00:1::1 3fff::1 4000::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1
        ff02::1 ff0e::1"""
    for address in private.split():
        assert not is_public(address), address


@given(st.ip_addresses())
def test_what_python_calls_private_is_not_public(ip):
    """Its list depends on the version, and lacks some; what it has must not be fetched from."""
    assert not is_public(str(ip)) or (ip.is_global and not ip.is_multicast) or ip in NAT64


NAT64 = ipaddress.ip_network("64:ff9b::/96")


BOMB = gzip.compress(gzip.compress(bytes(100_000_000)))  # 500 bytes


class Site(BaseHTTPRequestHandler):
    """`/image`, `/large`, `/missing`, and `/to/URL`, which redirects."""

    def do_GET(self):
        self.server.hosts.append(self.headers["Host"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.server.encodings.append(self.headers["Accept-Encoding"])
        content = {"/image": b"image", "/large": b"x" * 2000, "/gzip": BOMB}.get(self.path)
        self.send_response(404 if content is None else 200)
        if self.path == "/gzip":
            self.send_header("Content-Encoding", "gzip, gzip")
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.hosts, server.encodings = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load(url: str, is_allowed=is_public) -> bytes:
    return asyncio.run(ImageLoader(True, is_allowed).load(url, 1000))


def test_fetching(site):
    """127.0.0.1 plays the public internet here, and 127.0.0.2 what is private."""
    port = site.server_address[1]
    base = f"http://127.0.0.1:{port}"

    def public(address: str) -> bool:
        return address == "127.0.0.1"

    assert load(f"{base}/image", public) == b"image"
    assert load(f"{base}/to/{base}/image", public) == b"image"
    assert load(f"{base}/to//image", public) == b"image"
    for url, status, message in (
        (f"{base}/large", 413, "larger than 1,000 bytes"),
        (f"{base}/missing", 400, "answers 404"),
        (f"{base}/gzip", 400, "content encoding"),
        (f"{base}/to/http://127.0.0.2:{port}/image", 400, "not a public address"),
        (f"{base}/to/file:///etc/passwd", 400, "not an http"),
        (f"{base}/to/" + f"{base}/to/" * 4 + f"{base}/image", 400, "redirects"),
        ("http://127.0.0.1:1/image", 400, "cannot be fetched"),
        ("http://", 400, "is not an http"),
    ):
        with pytest.raises(HTTPException, match=message) as error:
            load(url, public)
        assert error.value.status_code == status
    assert all(host == f"127.0.0.1:{port}" for host in site.hosts)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "user@127.0.0.1"],
)
def test_private_addresses_are_never_connected_to(site, host):
    before = len(site.hosts)
    with pytest.raises(HTTPException) as error:
        load(f"http://{host}:{site.server_address[1]}/image")
    assert error.value.status_code == 400
    assert len(site.hosts) == before


NOWHERE = ImageLoader(True, lambda address: False)
ODD_HOSTS = ["localhost", "a" * 300, "xn--", "[::1", "1.2.3.4.5", "..", ""]
HOSTS = st.one_of(st.text(max_size=80), st.sampled_from(ODD_HOSTS))
PORTS = st.one_of(st.integers(-(10**6), 10**6).map(str), st.sampled_from(["99999999999999999999", "x", "٣"]))


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(["http", "https", "HTTP"]), HOSTS, PORTS, st.text(max_size=20))
def test_hosts_and_ports_that_no_resolver_takes(scheme, host, port, path):
    with pytest.raises(HTTPException) as error:
        asyncio.run(NOWHERE.load(f"{scheme}://{host}:{port}/{path}", 1000))
    assert error.value.status_code == 400


@pytest.fixture
def running():
    """A random model that never ends an answer by itself."""
    processor = build_processor()
    model = tiny_model(voco_token_id=processor.image_token_id)
    with in_process(model, processor, limits=Limits(max_tokens=400, max_queue=2)) as (app, url):
        yield model, app.app, url


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_steps(model) -> list[int]:
    steps: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    return steps


QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "What?"}]}


def test_a_cancelled_stream_is_not_computed_to_its_end(running):
    model, app, url = running
    steps, client = count_steps(model), client_of(url)
    stream = client.chat.completions.create(**QUESTION, stream=True)
    next(iter(stream))
    assert app.under_way == 1
    stream.close()
    wait_until(lambda: app.under_way == 0)
    # The thread that computes takes the next one up only when it is done with the last
    answer = client.chat.completions.create(**QUESTION, max_tokens=1)
    assert answer.usage.completion_tokens == 1
    # One for the answer; the stream may be gone before its first, and has some 400
    assert 1 <= len(steps) < 300


def test_who_is_gone_is_not_answered(running):
    """Neither while the answer is computed, nor when it is still waiting for its turn."""
    model, app, url = running
    steps = count_steps(model)
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps({**QUESTION, "seed": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connections = [socket.create_connection((host, int(port))) for _ in range(2)]
    for connection in connections:
        connection.sendall(head.encode() + body)
    wait_until(lambda: len(steps) > 2 and app.under_way == 2)
    for connection in connections:
        connection.close()
    wait_until(lambda: app.under_way == 0)
    assert client_of(url).chat.completions.create(**QUESTION, max_tokens=1).usage.completion_tokens == 1
    assert len(steps) < 350  # of 800


def test_a_request_that_does_not_arrive(running):
    """Of a body that is announced and not sent, and of one that is larger than announced."""
    _, app, url = running
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    app.limits = replace(app.limits, read_seconds=1, stall_seconds=0.2, max_request_bytes=1000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    for request, status in (
        (head + b"Content-Length: 50\r\n\r\n{", b"408"),
        (head + b"Content-Length: 5000\r\n\r\n", b"413"),
        (head + b"Transfer-Encoding: chunked\r\n\r\n7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n", b"413"),
    ):
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(request)
            assert connection.recv(100).split()[1] == status
    wait_until(lambda: app.under_way == 0)
