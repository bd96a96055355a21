"""The server that `vllm serve` starts, asked by the official client."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest


pytest.importorskip("vllm.version")  # `vllm` alone is this folder too

from integrations.vllm.engines import random_images

from voco_llama_hf import EMBEDDED_CHECKPOINT
from voco_llama_hf.integrations.vllm import image_part
from voco_llama_hf.store import Content, VoCoStore, hash_file


START_SECONDS = 600


@contextmanager
def serving(*args: str) -> Iterator[str]:
    """URL of a server of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", EMBEDDED_CHECKPOINT]
    small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--served-model-name", "tiny"]
    # Without what other tests here set for engines in this process
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port), *small, *args], env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=120)


@pytest.fixture(scope="module")
def archive(embedded, tmp_path_factory):
    """A store of one of two images, and the files of both."""
    model, processor = embedded
    folder = tmp_path_factory.mktemp("archive")
    paths = [folder / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, random_images(2, size=64)):
        image.save(path)
    with VoCoStore(folder / "store", model.fingerprint()) as store:
        pixels = processor(images=paths[0], return_tensors="pt")["pixel_values"]
        store.add([Content.of_file(paths[0])], [model.compress(pixels, num_voco_tokens=2)])
    return folder / "store", paths


@pytest.fixture(scope="module")
def client(archive):
    options = f'{{"voco_llama": {{"store": "{archive[0]}"}}}}'
    flags = ["--enable-mm-embeds", "--trust-request-mm-kwargs", "--additional-config", options]
    with serving(*flags, "--mm-processor-kwargs", '{"num_voco_tokens": 2}') as url:
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)


def url_of(path) -> dict:
    content = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def messages(*parts) -> list[dict]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def ask(client, *parts, **extra) -> str:
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages(*parts),
        temperature=0,
        max_tokens=8,
        extra_body={"ignore_eos": True, "skip_special_tokens": False, "return_token_ids": True, **extra},
    )
    return answer.choices[0].token_ids


def expected(embedded, images, *parts, k=2):
    model, processor = embedded
    text = processor.apply_chat_template(
        messages(*({"type": "image"} if isinstance(part, dict) else part for part in parts)),
        add_generation_prompt=True,
        tokenize=False,
    )
    inputs = processor(images=images, text=text, num_voco_tokens=k, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_chat(client, embedded, archive):
    first, second = map(url_of, archive[1])
    between = ("Here is one:", second, "and another:", first, "Which has more red?")
    assert ask(client, second, "What is this?") == expected(embedded, archive[1][1], second, "What is this?")
    assert ask(client, *between) == expected(embedded, archive[1][::-1], *between)
    assert ask(client, "What is red?") == expected(embedded, None, "What is red?")
    one = {"mm_processor_kwargs": {"num_voco_tokens": 1}}
    assert ask(client, second, "Is it?", **one) == expected(embedded, archive[1][1], second, "Is it?", k=1)


def test_a_video_is_its_frames(client):
    film = Path(EMBEDDED_CHECKPOINT).parents[1] / "demo" / "examples" / "film.mp4"
    content = base64.b64encode(film.read_bytes()).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}
    used = [
        client.chat.completions.create(
            model="tiny",
            messages=messages(part, "What moves?"),
            max_tokens=1,
            extra_body={"media_io_kwargs": {"video": {"num_frames": number}}},
        ).usage.prompt_tokens
        for number in (2, 6)
    ]
    assert used[1] - used[0] == 4 * 2


def test_compressed_images(client, embedded, archive):
    model, processor = embedded
    store, (path, _) = archive
    with VoCoStore(store) as opened:
        part = image_part(opened.get(hash_file(path)))
    named = {"type": "image_url", "image_url": None, "uuid": hash_file(path)}
    for given in (part, named, url_of(path)):
        assert ask(client, given, "What is this?") == expected(embedded, path, given, "What is this?")
    pixels = processor(images=list(archive[1]), return_tensors="pt")["pixel_values"]
    film = image_part(model.compress(pixels, num_voco_tokens=3))
    text = processor.apply_chat_template(
        messages({"type": "video"}, "What moves?"), add_generation_prompt=True, tokenize=False
    )
    frames = [list(random_images(2, size=64))]
    inputs = processor(videos=frames, text=text, num_voco_tokens=3, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    asked = ask(client, film, "What moves?")
    # A part of many images stands where an image stands; the template writes both kinds alike
    assert asked == output[0, inputs["input_ids"].shape[1] :].tolist()


def test_wrong_requests(client, embedded, archive):
    model, processor = embedded
    first = url_of(archive[1][0])
    pixels = processor(images=archive[1][0], return_tensors="pt")["pixel_values"]
    cache = model.compress(pixels)
    alien = model.compress(pixels)
    alien.fingerprint["vision_suffix_token_ids"] = "[7]"
    unknown = {"type": "image_url", "image_url": None, "uuid": "0" * 64}
    tensor = {"type": "image_embeds", "image_embeds": {"image_embeds": image_part(cache)["image_embeds"]}}
    for parts, extra in (
        (["What is <voco>?"], {}),
        ([first, "What is <image>?"], {}),
        ([first, image_part(cache), "Which?"], {}),
        ([image_part(alien), "What is this?"], {}),
        ([unknown, "What is this?"], {}),
        ([tensor, "What is this?"], {}),
        ([first, "What?"], {"mm_processor_kwargs": {"num_voco_tokens": 0}}),
        ([first, "What?"], {"mm_processor_kwargs": {"num_voco_tokens": 10_000}}),
        ([first, "What?"], {"mm_processor_kwargs": {"num_voco_tokens": [2]}}),
        ([first, "What?"], {"mm_processor_kwargs": {"do_resize": False}}),
        ([first, "What?"], {"mm_processor_kwargs": {"num_voco_tokens_per_tile": 1}}),
    ):
        with pytest.raises(openai.BadRequestError):
            ask(client, *parts, **extra)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt=[1, processor.image_token_id, 50], max_tokens=1)
    assert ask(client, "What is red?") == expected(embedded, None, "What is red?")
