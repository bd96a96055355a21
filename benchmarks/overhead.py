"""What a question about VoCo tokens takes beyond the same question without an image, and which part takes it.

Both run the same language model from `generate` to the first token, in turns; so does transformers' own LLaVA without
an image, which shows what its class takes beyond a text model. The parts are what this package adds to transformers'
own `generate`; their time is the host's, so on a GPU what their kernels take comes on top.

    python benchmarks/overhead.py --preset llava-1.5-7b --output benchmarks/results/overhead_llava_7b_cpu.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Cache

from voco_llama_hf.benchmark.measure import Timing, alternate
from voco_llama_hf.benchmark.presets import PRESETS, build_model
from voco_llama_hf.benchmark.question import LIMIT, NO_CACHE, VOCO_CACHE, Question, make_networks
from voco_llama_hf.benchmark.results import about
from voco_llama_hf.files import written_aside
from voco_llama_hf.modeling import generation_voco_llama, modeling_voco_llama, two_stages_voco_llama
from voco_llama_hf.modeling.injection_voco_llama import CompressedImages, InjectionCache


LLAVA = "text only, LLaVA"
INJECT, FILL = "inject keys and values", "fill the cache"
PARTS = {
    "find new images": (generation_voco_llama, "find_new_images"),
    "compare fingerprints": (modeling_voco_llama.VoCoLlamaModel, "fingerprint"),
    "rotate keys": (modeling_voco_llama.VoCoLlamaModel, "rotate_keys"),
    "find columns in front": (two_stages_voco_llama, "count_front_columns"),
    "lay out keys and values": (InjectionCache, "__init__"),
    "choose the tokens of a pass": (CompressedImages, "window"),
    INJECT: (InjectionCache, "update"),
    FILL: (Cache, "update"),  # transformers' own, inside of the one above and where columns are left out
}


class Stopwatch:
    """Seconds of the host that the parts take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, self._timed(name, getattr(owner, attribute)))

    def _timed(self, name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return call

    def read(self) -> dict[str, float]:
        """What the parts took since the last reading."""
        seconds = dict(self.seconds)
        self.seconds.clear()
        seconds[INJECT] -= min(seconds[INJECT], seconds.pop(FILL))
        return seconds


def ask(networks: dict[str, Any], way: str, question: Question, static: bool) -> Callable[[], Any]:
    """A call of `generate` to the first token."""
    inputs = {
        name: value.to(question.model.device) if isinstance(value, torch.Tensor) else value
        for name, value in question.inputs(LIMIT if way == LLAVA else way).items()
    }
    options = {"do_sample": False, "max_new_tokens": 1, "eos_token_id": None, "pad_token_id": 0}
    if static:
        options |= {"cache_implementation": "static", "max_cache_len": inputs["input_ids"].shape[1] + 1}
    return lambda: networks[way].generate(**inputs, **options)


def measure(networks: dict[str, Any], question: Question, rounds: int, static: bool) -> dict[str, Any]:
    """Times of the questions."""
    calls = {way: ask(networks, way, question, static) for way in (VOCO_CACHE, LLAVA, LIMIT)}
    timings: dict[str, Timing] = alternate(calls, rounds, question.model.device)
    return {
        "batch_size": question.batch_size,
        "seconds": {way: timing.median for way, timing in timings.items()},
        "processor_seconds": {way: timing.processor_median for way, timing in timings.items()},
        "ratio": timings[VOCO_CACHE].median / timings[LIMIT].median,
    }


def measure_parts(call: Callable[[], Any], stopwatch: Stopwatch, rounds: int) -> dict[str, float]:
    """Median seconds of the host by part."""
    call()
    stopwatch.read()
    readings = []
    for _ in range(rounds):
        call()
        readings.append(stopwatch.read())
    return {name: statistics.median(reading[name] for reading in readings) for name in readings[0]}


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}, with random weights.")] = "llava-1.5-7b",
    device: str = "cpu",
    dtype: str = "bfloat16",
    num_voco_tokens: int = 1,
    prompt_tokens: int = 32,
    batch_sizes: Annotated[str, typer.Option(help="Separated by commas.")] = "1,8",
    rounds: int = 3,
    static: Annotated[bool, typer.Option(help="With static caches, into which compiled decoding writes.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure what this package adds to a question."""
    console = Console(width=100)
    with console.status("Drawing random weights"):
        model = build_model(PRESETS[preset](), device, getattr(torch, dtype))
    networks = make_networks(model)
    networks[LLAVA] = networks[NO_CACHE]
    records = []
    for batch_size in map(int, batch_sizes.split(",")):
        question = Question(networks, num_voco_tokens, prompt_tokens, batch_size)
        with console.status(f"Batch of {batch_size}"):
            records.append(measure(networks, question, rounds, static))
    stopwatch = Stopwatch()
    for record in records:
        question = Question(networks, num_voco_tokens, prompt_tokens, record["batch_size"])
        record["parts"] = measure_parts(ask(networks, VOCO_CACHE, question, static), stopwatch, rounds)
        console.print(make_table(record, preset, prompt_tokens))
    if output is not None:
        settings = {
            "num_voco_tokens": num_voco_tokens,
            "prompt_tokens": prompt_tokens,
            "rounds": rounds,
            "static": static,
        }
        with written_aside(output) as part:
            part.write_text(
                json.dumps({**about(preset, model, model.dtype), **settings, "first_token": records}, indent=2) + "\n"
            )


def make_table(record: dict[str, Any], preset: str, prompt_tokens: int) -> Table:
    text_only = record["seconds"][LIMIT]
    table = Table(
        title=f"{preset}, {prompt_tokens} tokens of text, batch of {record['batch_size']}: to the first token"
    )
    for heading in ("", "milliseconds", "of text only"):
        table.add_column(heading, justify="right" if heading else "left")
    for way, seconds in record["seconds"].items():
        table.add_row(way, f"{1e3 * seconds:.2f}", f"{seconds / text_only:.3f}x")
    table.add_section()
    for name, seconds in {**record["parts"], "all parts": sum(record["parts"].values())}.items():
        table.add_row(name, f"{1e3 * seconds:.3f}", f"{seconds / text_only:.2%}")
    return table


if __name__ == "__main__":
    typer.run(main)
