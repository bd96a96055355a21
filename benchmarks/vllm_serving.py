"""Serving compared: this package's server, vLLM with its plugin, and vLLM with LLaVA of the same weights.

All three run at once and are asked in turns, by OpenAI's client, by one and by many clients, about images that are new
and about a few that come again. The weights are random: what is measured does not depend on them. vLLM's LLaVA needs a
torchvision that fits torch; without one it is left out.

    make benchmark-vllm
    .vllm/bin/python benchmarks/vllm_serving.py --output benchmarks/results/vllm_serving_cpu.json
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from openai import AsyncOpenAI, OpenAI
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaProcessor

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.benchmark.results import about
from voco_llama_hf.files import written_aside
from voco_llama_hf.llava import as_llava


SIDE, PATCH = 192, 8  # 576 vision tokens, as CLIP ViT-L/14 has at 336 pixels
OURS, PLUGIN, LLAVA = "voco-llama serve", "vLLM, VoCo-LLaMA", "vLLM, LLaVA"
QUESTION = "What colour is the circle that is left of the green square?"
KNOWN_IMAGES = 4
START_SECONDS = 900


@dataclass
class Measured:
    """One server, one number of clients, new or repeated images."""

    server: str
    clients: int
    images: str
    requests: int
    requests_per_second: float
    tokens_per_second: float
    first_token_seconds: float


def make_checkpoints(folder: Path, hidden_size: int, layers: int) -> tuple[Path, Path]:
    """The same random weights as a VoCo-LLaMA and as a LLaVA."""
    processor = VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    processor.image_processor.size = {"height": SIDE, "width": SIDE}
    tokenizer = processor.tokenizer
    heads = hidden_size // 64
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        vision_feature_layer=-1,
        voco_token_id=processor.image_token_id,
        vision_suffix_token_ids=tokenizer("\n", add_special_tokens=False).input_ids,
    )
    torch.manual_seed(0)
    model = VoCoLlamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Answers of full length, and none of the tokens that end or begin something
        model.lm_head.weight[: processor.image_token_id + 1] = 0
    voco, llava = folder / "voco", folder / "llava"
    model.save_pretrained(voco)
    processor.save_pretrained(voco)
    as_llava(model, tokenizer.convert_tokens_to_ids("<image>")).save_pretrained(llava)
    # vLLM knows the vision tower by the names of older versions of transformers
    weights = load_file(llava / "model.safetensors")
    tower = "vision_tower."
    save_file(
        {name.replace(tower, f"{tower}vision_model."): weight for name, weight in weights.items()},
        llava / "model.safetensors",
        metadata={"format": "pt"},
    )
    LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=processor.chat_template,
    ).save_pretrained(llava)
    return voco, llava


def commands(voco: Path, llava: Path, max_tokens: int) -> dict[str, list[str]]:
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "model"]
    small = ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--max-num-seqs", "32"]
    ours = [sys.executable, "-m", "voco_llama_cli", "serve", str(voco), "--model-id", "model", "--dtype", "float32"]
    found = {
        OURS: [*ours, "--max-tokens", str(max_tokens)],
        PLUGIN: [*vllm, "--model", str(voco), *small],
        LLAVA: [*vllm, "--model", str(llava), *small],
    }
    with contextlib.suppress(Exception):  # whatever it fails of, vLLM's LLaVA fails of it too
        importlib.import_module("vllm.model_executor.models.llava")
        return found
    del found[LLAVA]
    return found


@contextlib.contextmanager
def serving(name: str, command: list[str], threads: int) -> Iterator[str]:
    """URL of a server of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=120)


def picture(rng: np.random.Generator) -> str:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def conversation(*images: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


async def ask(client: AsyncOpenAI, image: str, max_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens of the answer."""
    start, first, tokens = time.perf_counter(), None, 0
    stream = await client.chat.completions.create(
        model="model",
        messages=conversation(image),
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )
    async for chunk in stream:
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.perf_counter() - start
        tokens = tokens if chunk.usage is None else chunk.usage.completion_tokens
    return first if first is not None else time.perf_counter() - start, tokens


async def load(url: str, clients: int, images: list[str], max_tokens: int) -> tuple[list[tuple[float, int]], float]:
    """Each client asks about the next image as soon as it has its answer."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=3600)
    waiting, answers = list(reversed(images)), []

    async def one() -> None:
        while waiting:
            answers.append(await ask(client, waiting.pop(), max_tokens))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    seconds = time.perf_counter() - start
    await client.close()
    return answers, seconds


def image_tokens(url: str, image: str) -> int:
    """What an image costs in a prompt."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=3600)
    with_image, without = (
        client.chat.completions.create(model="model", messages=messages, max_tokens=1).usage
        for messages in (conversation(image, image), conversation(image))
    )
    return with_image.prompt_tokens - without.prompt_tokens  # type: ignore[union-attr]


def block_size(url: str) -> int | None:
    """Tokens of a block of vLLM's cache."""
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/metrics") as response:
        found = re.search(r'cache_config_info\{.*?block_size="(\d+)"', response.read().decode())
        return None if found is None else int(found[1])
    return None


def show(console: Console, results: dict[str, Any]) -> None:
    table = Table(title=f"{results['hardware']}, {results['max_tokens']} tokens an answer")
    for heading in ("images", "clients", "server", "requests/s", "tokens/s", "first token"):
        table.add_column(heading, justify="left" if heading in ("images", "server") else "right")
    for row in sorted(results["measured"], key=lambda row: (row["images"], row["clients"])):
        table.add_row(
            row["images"],
            str(row["clients"]),
            row["server"],
            f"{row['requests_per_second']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['first_token_seconds']:.2f} s",
        )
    console.print(table)
    for name, image in results["image"].items():
        size = image["block_size"]
        blocks = "" if size is None else f", {image['tokens'] / size:.3f} blocks of {size}"
        console.print(f"{name}: {image['tokens']} tokens of the prompt an image{blocks}")


def main(
    clients: Annotated[list[int] | None, typer.Option(help="Clients at a time; several times.")] = None,
    requests: Annotated[int, typer.Option(help="Requests a client, at least 8 in all.")] = 2,
    rounds: Annotated[int, typer.Option(help="Times that all servers are asked in turn.")] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 16,
    hidden_size: Annotated[int, typer.Option(help="Of the text model.")] = 512,
    layers: Annotated[int, typer.Option(help="Of the text model.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of each server.")] = os.cpu_count() or 1,
    output: Annotated[Path | None, typer.Option(help="File for the results.")] = None,
) -> None:
    console, rng = Console(width=120), np.random.default_rng(0)
    known = [picture(rng) for _ in range(KNOWN_IMAGES)]
    load_average = os.getloadavg()  # of what else this machine does
    collected: dict[tuple[str, int, str], list[tuple[list[tuple[float, int]], float]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = commands(*make_checkpoints(folder, hidden_size, layers), max_tokens)
        if LLAVA not in started:
            console.print(f"{LLAVA} is left out: vLLM's LLaVA cannot be imported, which needs torchvision")
        urls = {}
        for name, command in started.items():
            console.print(f"starting {name}")
            urls[name] = stack.enter_context(serving(name, command, threads))
        image = {
            name: {"tokens": image_tokens(url, known[0]), "block_size": block_size(url)} for name, url in urls.items()
        }
        for url in urls.values():
            asyncio.run(load(url, 1, known, max_tokens))
        for number in range(rounds):
            for count in clients or [1, 8, 32]:
                total = max(8, count * requests)
                for kind in ("new", "repeated"):
                    # The same for all servers
                    images = [picture(rng) if kind == "new" else known[i % KNOWN_IMAGES] for i in range(total)]
                    for name, url in urls.items():
                        console.print(f"round {number + 1}: {count} clients, {kind} images, {name}")
                        run = asyncio.run(load(url, count, images, max_tokens))
                        collected.setdefault((name, count, kind), []).append(run)
    measured = []
    for (name, count, kind), runs in collected.items():
        answers = [answer for run, _ in runs for answer in run]
        seconds = sum(seconds for _, seconds in runs)
        measured.append(
            Measured(
                name,
                count,
                kind,
                len(answers),
                len(answers) / seconds,
                sum(tokens for _, tokens in answers) / seconds,
                statistics.median(first for first, _ in answers),
            )
        )
    cpu = torch.nn.Linear(1, 1)
    results = {
        **about(f"random, {layers} layers of {hidden_size}, 576 vision tokens", None, torch.float32),
        "hardware": f"{os.uname().machine}, {os.cpu_count()} cores, {cpu.weight.device.type}",
        "vllm": next(found.version for found in distributions() if found.name in ("vllm", "vllm-cpu")),
        "threads": threads,
        "load_average": load_average,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "image": image,
        "measured": [asdict(row) for row in measured],
    }
    show(console, results)
    if output is not None:
        with written_aside(output) as aside:
            aside.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
