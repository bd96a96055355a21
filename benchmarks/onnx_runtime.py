"""ONNX Runtime against PyTorch, eager and compiled, as ratios: to compress images, to the first token from a cached
image, and to every further token.

All run the same weights in one process; calls alternate, and medians are compared. Everybody has the same threads.

    python benchmarks/onnx_runtime.py --preset embedded
    python benchmarks/onnx_runtime.py --preset half-billion --output benchmarks/results/onnx_half_billion_cpu.json
    python benchmarks/onnx_runtime.py --preset 7b --provider CUDAExecutionProvider --precision fp16

On a GPU the stage onnx_providers of `make gpu` runs it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated

import onnxruntime
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx
from voco_llama_hf.export.exporter import PRECISIONS, ExportReport
from voco_llama_hf.export.providers import CUDA_PROVIDERS


# Text model and vision tower, which is CLIP-L: hidden size, intermediate size, layers, heads, key-value heads
PRESETS = {
    "smallest": ((64, 128, 2, 2, 2), (64, 128, 2, 2)),
    "embedded": None,
    "half-billion": ((1024, 2816, 24, 16, 16), (1024, 4096, 24, 16)),
    "7b": ((4096, 11008, 32, 32, 32), (1024, 4096, 24, 16)),
}
VARIANTS = ("eager", "compiled", "onnxruntime")
TASKS = ("compress", "first token", "token")
Preset = Enum("Preset", {name: name for name in PRESETS})
Precision = Enum("Precision", {name: name for name in PRECISIONS})
Call = Callable[[], object]


def build(preset: str, precision: str, device: str) -> VoCoLlamaForConditionalGeneration:
    """The embedded checkpoint, or random weights."""
    dtype = PRECISIONS[precision]
    if PRESETS[preset] is None:
        return VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=dtype).to(device).eval()
    text, vision = PRESETS[preset]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(
            **dict(zip((*names, "num_key_value_heads"), text)), vocab_size=32064, max_position_embeddings=4096
        ),
        vision_config=CLIPVisionConfig(**dict(zip(names, vision)), image_size=336, patch_size=14),
    )
    torch.manual_seed(0)
    with torch.device(device):
        return VoCoLlamaForConditionalGeneration._from_config(config, dtype=dtype).eval()


def make_calls(model, batch_size: int, num_voco_tokens: int, text_tokens: int, new_tokens: int) -> dict[str, Call]:
    """One call a task. Text is random, with each image first."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    size = config.vision_config.image_size
    pixels = torch.randn(batch_size, 3, size, size, generator=generator).to(model.device, model.dtype)
    cache = model.compress(pixels, num_voco_tokens)
    image = torch.full((batch_size, num_voco_tokens), config.voco_token_id)
    text = torch.randint(3, 400, (batch_size, text_tokens), generator=generator)
    inputs = {"input_ids": torch.cat([image, text], dim=1).to(model.device), "voco_cache": cache}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {
        "compress": lambda: model.compress(pixels, num_voco_tokens),
        "first token": lambda: model.generate(**inputs, **options, max_new_tokens=1),
        "token": lambda: model.generate(**inputs, **options, max_new_tokens=new_tokens),
    }


def compile_layers(model: VoCoLlamaForConditionalGeneration) -> VoCoLlamaForConditionalGeneration:
    # A dynamic cache has each layer compiled for its number, and beyond 8 nothing would be
    torch._dynamo.config.recompile_limit = 8 * len(model.model.language_model.layers)
    for layer in (*model.model.language_model.layers, *model.model.vision_tower.encoder.layers):
        layer.compile(dynamic=True)
    return model


@contextmanager
def prepared(
    preset: str,
    precision: str,
    provider: str,
    fused: bool = True,
    threads: int | None = None,
    progress: Callable[[str], object] = print,
) -> Iterator[tuple[dict, ExportReport]]:
    """
    The same weights in PyTorch and in ONNX Runtime, and how far the graphs are from PyTorch, which the export compares
    them with.
    """
    device = "cuda" if provider in CUDA_PROVIDERS else "cpu"
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        model = build(preset, precision, device)
        parity = export_onnx(
            *(model, Path(folder) / "onnx"),
            precision=precision,
            provider=provider if fused else None,
            progress=progress,
        )
        models = {
            "eager": model,
            "onnxruntime": ORTVoCoLlamaForConditionalGeneration.from_pretrained(
                Path(folder) / "onnx", provider=provider, session_options=options
            ),
        }
        yield models, parity


def compare(
    models: dict, batch_sizes: list[int], num_voco_tokens: int, text_tokens: int, new_tokens: int, rounds: int
) -> list[dict]:
    """Median seconds by batch size, task and variant."""
    records = []
    for batch_size in batch_sizes:
        calls = {
            variant: make_calls(model, batch_size, num_voco_tokens, text_tokens, new_tokens)
            for variant, model in models.items()
        }
        records.append({"batch_size": batch_size, "seconds": measure(calls, rounds, new_tokens)})
    return records


def measure(calls: dict[str, dict[str, Call]], rounds: int, new_tokens: int) -> dict[str, dict[str, float]]:
    """Median seconds by task and variant; those of a token without the first."""
    seconds: dict[str, dict[str, list[float]]] = {task: {variant: [] for variant in calls} for task in TASKS}
    for round_number in track(range(rounds + 1), description="Alternating"):
        for task in TASKS:
            for variant, by_task in calls.items():
                start = time.perf_counter()
                by_task[task]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if round_number > 0:  # the first round warms up
                    seconds[task][variant].append(time.perf_counter() - start)
    medians = {
        task: {variant: statistics.median(times) for variant, times in by_variant.items()}
        for task, by_variant in seconds.items()
    }
    for variant in calls:
        medians["token"][variant] = (medians["token"][variant] - medians["first token"][variant]) / (new_tokens - 1)
    return medians


def main(
    preset: Preset = Preset.embedded,
    precision: Precision = Precision.fp32,
    provider: str = "CPUExecutionProvider",
    batch_sizes: Annotated[list[int], typer.Option("--batch-size")] = [1, 8],  # noqa: B006
    num_voco_tokens: int = 2,
    text_tokens: int = 24,
    new_tokens: int = 33,
    rounds: int = 11,
    threads: Annotated[int | None, typer.Option(help="By default all cores.")] = None,
    fused: Annotated[bool, typer.Option(help="Fuse the graphs for the provider.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Compare ONNX Runtime with PyTorch."""
    device = "cuda" if provider in CUDA_PROVIDERS else "cpu"
    threads = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    console = Console(width=120)
    with prepared(preset.value, precision.value, provider, fused, threads, console.print) as (models, _):
        models["compiled"] = compile_layers(build(preset.value, precision.value, device))
        records = compare(models, batch_sizes, num_voco_tokens, text_tokens, new_tokens, rounds)

    table = Table(title=f"{preset.value}, {precision.value}, {provider}, {threads} threads")
    for heading in ("batch", "task", *(f"{variant} ms" for variant in VARIANTS), "against eager", "against compiled"):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for record in records:
        for task, seconds in record["seconds"].items():
            table.add_row(
                *(str(record["batch_size"]), task),
                *(f"{1e3 * seconds[variant]:.2f}" for variant in VARIANTS),
                *(f"{seconds[variant] / seconds['onnxruntime']:.2f}x" for variant in VARIANTS[:2]),
            )
    console.print(table)
    if output is not None:
        report = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": torch.cuda.get_device_name()
            if device == "cuda"
            else f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "onnxruntime": onnxruntime.__version__,
            },
            "preset": preset.value,
            "precision": precision.value,
            "provider": provider,
            "threads": threads,
            "num_voco_tokens": num_voco_tokens,
            "text_tokens": text_tokens,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "fused": fused,
            "by_batch_size": records,
        }
        aside = output.with_name(f".{output.name}.part")
        aside.write_text(json.dumps(report, indent=2) + "\n")
        aside.replace(output)


if __name__ == "__main__":
    typer.run(main)
