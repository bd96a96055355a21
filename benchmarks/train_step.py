"""One training step with VoCo attention against one plain LLaVA step of transformers: time and peak memory, as ratios.

Both run the same weights over sequences of the same length, forward and backward. The steps alternate in one process,
and medians are compared; peak memory is measured in processes of their own on a CPU.

    python benchmarks/train_step.py --preset tiny
    python benchmarks/train_step.py --preset llava-1.5-7b-quarter --device cuda --dtype bfloat16
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig

from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from voco_llama_hf.files import written_aside
from voco_llama_hf.llava import as_llava


BOS, NEWLINE, VOCO = 1, 13, 127


def text_options(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, key_value_heads: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
    }


def vision_options(
    hidden_size: int, intermediate_size: int, layers: int, heads: int, image_size: int, patch_size: int
) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": patch_size,
    }


# Text model and vision tower
PRESETS = {
    "tiny": (text_options(256, 512, 6, 4, 2), vision_options(192, 512, 4, 3, 64, 8)),
    "small": (text_options(512, 1376, 4, 8, 8), vision_options(192, 512, 2, 3, 336, 14)),
    # A 7B without gradient checkpointing does not fit into one GPU: a quarter of its layers, all of their shape
    "llava-1.5-7b-quarter": (text_options(4096, 11008, 8, 32, 32), vision_options(1024, 4096, 24, 16, 336, 14)),
}
VARIANTS = ("llava sdpa", "voco sdpa", "voco flex_attention")
Preset = Enum("Preset", {name: name for name in PRESETS})


def build(preset: str, variant: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The same random weights for every variant; the vision tower is frozen, as in training."""
    text_config, vision_config = PRESETS[preset]
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(
            **text_config, vocab_size=32064 if "llava" in preset else 512, max_position_embeddings=4096
        ),
        vision_config=CLIPVisionConfig(**vision_config),
        voco_token_id=VOCO,
        vision_prefix_token_ids=[BOS],
        vision_suffix_token_ids=[NEWLINE],
        attn_implementation=variant.split()[1],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = VoCoLlamaForConditionalGeneration._from_config(config, dtype=dtype)
    if variant.startswith("llava"):
        model = as_llava(model)
        model.set_attn_implementation("sdpa")
    model.model.vision_tower.requires_grad_(False)
    model.model.vision_tower.set_attn_implementation("sdpa")
    return model.train()


def make_step(
    model: torch.nn.Module, batch_size: int, text_tokens: int, num_voco_tokens: int, compiled: bool
) -> Callable[[], None]:
    """Forward and backward over images and random text; the sequences of all variants are equally long."""
    vision = model.config.vision_config
    num_vision = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    if not isinstance(model, VoCoLlamaForConditionalGeneration):
        # Room that prefix, suffix and VoCo tokens take in the other
        image, text_tokens = [BOS, *[VOCO] * num_vision], text_tokens + 1 + num_voco_tokens
    else:
        image = [VOCO] * num_voco_tokens
    text = torch.randint(3, VOCO, (batch_size, text_tokens), generator=generator)
    ids = torch.cat([torch.tensor(image).expand(batch_size, -1), text], dim=1)
    labels = ids.masked_fill(ids == VOCO, -100)
    pixels = torch.randn(batch_size, 3, vision.image_size, vision.image_size, generator=generator)
    inputs = {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "labels": labels.to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
        "use_cache": False,
    }
    if compiled:
        for layer in model.model.language_model.layers:
            layer.compile()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def peak_memory(step: Callable[[], None], device: str) -> float:
    """Bytes that a step needs above what is held before."""
    if device.startswith("cuda"):
        step()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - held
    # Linux: 5 resets the peak of the resident set
    Path("/proc/self/clear_refs").write_text("5")
    held = resident("VmRSS")
    step()
    return resident("VmHWM") - held


def resident(name: str) -> int:
    """A size of this process in bytes: `VmRSS` now, `VmHWM` its peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def main(
    preset: Preset = Preset.tiny,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
    text_tokens: int = 128,
    num_voco_tokens: int = 2,
    rounds: int = 15,
    compiled: Annotated[bool, typer.Option(help="Compile the layers of the language model.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare training steps."""

    def prepare(variant: str) -> Callable[[], None]:
        model = build(preset.value, variant, device, getattr(torch, dtype))
        return make_step(model, batch_size, text_tokens, num_voco_tokens, compiled)

    if memory_of is not None:
        print(json.dumps(peak_memory(prepare(memory_of), device)))
        return
    steps, problems = {}, {}
    for variant in VARIANTS:
        try:
            steps[variant] = prepare(variant)
            steps[variant]()
        except (RuntimeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
            del steps[variant]
            problems[variant] = str(error).strip().splitlines()[-1][:160]
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in track(range(rounds), description="Alternating"):
        for variant, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[variant].append(time.perf_counter() - start)
    memory = {}
    for variant in steps:
        call = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
        memory[variant] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    options = {
        "dtype": dtype,
        "batch_size": batch_size,
        "text_tokens": text_tokens,
        "num_voco_tokens": num_voco_tokens,
        "rounds": rounds,
        "compiled": compiled,
    }
    report(preset.value, device, seconds, memory, problems, output, options)


def report(preset, device, seconds, memory, problems, output, options) -> None:
    """Prints medians, spreads and ratios, and writes them."""
    plain = VARIANTS[0]
    medians = {variant: statistics.median(times) for variant, times in seconds.items()}
    table = Table(title=f"One training step, {preset} on {device}, {options['dtype']}")
    for heading in ("variant", "median ms", "25 % to 75 %", "time ratio", "peak MB", "memory ratio"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for variant, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4)
        table.add_row(
            variant,
            f"{1e3 * medians[variant]:.1f}",
            f"{1e3 * low:.1f} to {1e3 * high:.1f}",
            f"{medians[variant] / medians[plain]:.3f}",
            f"{memory[variant] / 1e6:.0f}",
            f"{memory[variant] / memory[plain]:.3f}",
        )
    for variant, problem in problems.items():
        table.add_row(variant, f"cannot run: {problem}")
    Console(width=120).print(table)
    if output is not None:
        record = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": torch.cuda.get_device_name()
            if device.startswith("cuda")
            else f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "preset": preset,
            **options,
            "median_seconds": medians,
            "peak_bytes": memory,
            "time_ratio": {variant: medians[variant] / medians[plain] for variant in medians},
            "memory_ratio": {variant: memory[variant] / memory[plain] for variant in memory},
            "cannot_run": problems,
        }
        with written_aside(output) as part:
            part.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
