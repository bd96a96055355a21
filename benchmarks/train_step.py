"""One training step with VoCo attention against one plain LLaVA step of transformers: time and peak memory, as ratios.

All run the same weights, those of one model, over sequences of the same length, forward and backward. The steps
alternate in one process, and medians are compared; peak memory is measured in processes of their own on a CPU.

    python benchmarks/train_step.py --preset tiny
    python benchmarks/train_step.py --preset llava-1.5-7b --gradient-checkpointing --device cuda --dtype bfloat16
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
from dataclasses import dataclass
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
    "llava-1.5-7b": (text_options(4096, 11008, 32, 32, 32), vision_options(1024, 4096, 24, 16, 336, 14)),
    # Without gradient checkpointing a 7B does not fit into one GPU: a quarter of its layers, all of their shape
    "llava-1.5-7b-quarter": (text_options(4096, 11008, 8, 32, 32), vision_options(1024, 4096, 24, 16, 336, 14)),
}
Preset = Enum("Preset", {name: name for name in PRESETS})


@dataclass(frozen=True)
class Variant:
    """
    A way to take a step.

    Args:
        attention (`str`): Attention of the language model.
        is_llava (`bool`): Whether it is transformers' LLaVA that steps.
        two_stages (`bool`): Whether images are compressed first; does not go with gradient checkpointing.
        draws (`int`): Numbers of VoCo tokens that every image, compressed once, is read with: 1, 2, ...
        is_distilled (`bool`): Whether the model learns from its own reading of the uncompressed image (Eq. 5).
    """

    attention: str = "sdpa"
    is_llava: bool = False
    two_stages: bool = False
    draws: int = 1
    is_distilled: bool = False


PLAIN = "llava sdpa"
VARIANTS = {
    PLAIN: Variant(is_llava=True),
    "voco sdpa": Variant(),
    "voco flex_attention": Variant("flex_attention"),
    "voco sdpa, two stages": Variant(two_stages=True),
    "voco sdpa, two draws": Variant(two_stages=True, draws=2),
    "voco sdpa, distilled": Variant(is_distilled=True),
}


def build(
    preset: str, device: str, dtype: torch.dtype, gradient_checkpointing: bool = False, compiled: bool = False
) -> VoCoLlamaForConditionalGeneration:
    """Random weights, which all variants share; the vision tower is frozen, as in training."""
    text_config, vision_config = PRESETS[preset]
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(
            **text_config, vocab_size=32064 if "llava" in preset else 512, max_position_embeddings=4096
        ),
        vision_config=CLIPVisionConfig(**vision_config),
        voco_token_id=VOCO,
        vision_prefix_token_ids=[BOS],
        vision_suffix_token_ids=[NEWLINE],
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = VoCoLlamaForConditionalGeneration._from_config(config, dtype=dtype)
    model.model.vision_tower.requires_grad_(False)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for layer in model.model.language_model.layers:
            layer.compile()
    return model.train()


def make_step(
    model: VoCoLlamaForConditionalGeneration,
    variant: Variant,
    batch_size: int,
    text_tokens: int,
    num_voco_tokens: int,
) -> Callable[[], None]:
    """Forward and backward over images and random text; the sequences of all variants are equally long."""
    vision = model.config.vision_config
    num_vision = (vision.image_size // vision.patch_size) ** 2
    generator = torch.Generator().manual_seed(0)
    network: Any = model
    if variant.is_llava:
        # Room that prefix, suffix and VoCo tokens take in the other
        image, text_tokens = [BOS, *[VOCO] * num_vision], text_tokens + 1 + num_voco_tokens
        network = as_llava(model)
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
    if variant.two_stages:
        inputs |= {"two_stages": True, "use_cache": True}
    if variant.draws > 1:
        inputs = draw_rows(inputs, num_voco_tokens, variant.draws)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        # Weights and configuration are shared, and so is what was said before
        model.model.language_model.set_attn_implementation(variant.attention)
        network.train()
        loss = distilled_loss(model, inputs) if variant.is_distilled else network(**inputs).loss
        loss.backward()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def draw_rows(inputs: dict[str, Any], num_voco_tokens: int, draws: int) -> dict[str, Any]:
    """The rows of a batch once for each of `draws` numbers, the largest of which is `num_voco_tokens`."""
    # Needs the extra train
    from voco_llama_hf.training.elastic import repeat_rows

    counts = torch.full((len(inputs["pixel_values"]),), num_voco_tokens, device=inputs["input_ids"].device)
    numbers = [max(1, num_voco_tokens - draw) for draw in range(draws)]
    rows = repeat_rows({**inputs, "num_voco_tokens": counts}, numbers, VOCO, 0)
    del rows["num_draws"]
    return rows


def distilled_loss(model: VoCoLlamaForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """Half the loss of the next token, half the divergence from the model's own reading of the uncompressed image."""
    # Needs the extra train
    from voco_llama_hf.training.distillation import (
        Reading,
        kl_divergence,
        on_last_hidden_states,
        read_uncompressed,
    )

    teacher = read_uncompressed(model, model, inputs, without_adapters=False)
    sums: list[torch.Tensor] = []

    def compare(hidden_states: torch.Tensor) -> None:
        reading = Reading(hidden_states, model.get_output_embeddings())
        sums.append(kl_divergence(reading, teacher, inputs["labels"], 1.0))

    with on_last_hidden_states(model, compare):
        loss = model(**inputs).loss
    return 0.5 * loss + 0.5 * sums[0] / (inputs["labels"][:, 1:] != -100).sum()


def peak_memory(model: torch.nn.Module, step: Callable[[], None]) -> float:
    """Bytes that a step needs above the weights."""
    if model.device.type == "cuda":
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
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


def take_turns(steps: dict[str, Callable[[], None]], rounds: int) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of the steps, and why those that cannot be taken cannot. The first of each warms up."""
    able, problems = dict(steps), {}
    for name, step in steps.items():
        try:
            step()
        except (RuntimeError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
            del able[name]
            problems[name] = str(error).strip().splitlines()[-1][:160]
    seconds: dict[str, list[float]] = {name: [] for name in able}
    for _ in track(range(rounds), description="Alternating"):
        for name, step in able.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds, problems


def main(
    preset: Preset = Preset.tiny,
    device: str = "cpu",
    dtype: str = "float32",
    batch_size: int = 8,
    text_tokens: int = 128,
    num_voco_tokens: int = 2,
    rounds: int = 15,
    compiled: Annotated[bool, typer.Option(help="Compile the layers of the language model.")] = False,
    gradient_checkpointing: bool = False,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    memory_of: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Compare training steps."""
    model = build(preset.value, device, getattr(torch, dtype), gradient_checkpointing, compiled)
    steps = {
        name: make_step(model, variant, batch_size, text_tokens, num_voco_tokens)
        for name, variant in VARIANTS.items()
        if not (gradient_checkpointing and variant.two_stages)
    }
    if memory_of is not None:
        print(json.dumps(peak_memory(model, steps[memory_of])))
        return
    seconds, problems = take_turns(steps, rounds)
    memory = {}
    for variant in seconds:
        if model.device.type == "cuda":
            memory[variant] = peak_memory(model, steps[variant])
            continue
        call = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
        memory[variant] = float(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    options = {
        "dtype": dtype,
        "batch_size": batch_size,
        "text_tokens": text_tokens,
        "num_voco_tokens": num_voco_tokens,
        "rounds": rounds,
        "compiled": compiled,
        "gradient_checkpointing": gradient_checkpointing,
    }
    report(preset.value, device, seconds, memory, problems, output, options)


def report(preset, device, seconds, memory, problems, output, options) -> None:
    """Prints medians, spreads and ratios, and writes them."""
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
            f"{medians[variant] / medians[PLAIN]:.3f}",
            f"{memory[variant] / 1e6:.0f}",
            f"{memory[variant] / memory[PLAIN]:.3f}",
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
            "time_ratio": {variant: medians[variant] / medians[PLAIN] for variant in medians},
            "memory_ratio": {variant: memory[variant] / memory[PLAIN] for variant in memory},
            "cannot_run": problems,
        }
        with written_aside(output) as part:
            part.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
