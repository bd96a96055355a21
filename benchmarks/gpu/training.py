"""A step of training, forward and backward in bfloat16, against one of LLaVA: see `benchmarks/train_step.py`."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from benchmarks import train_step

from .networks import free_memory
from .record import Parts
from .setting import Setting


BATCH_SIZE, TEXT_TOKENS, NUM_VOCO_TOKENS = 8, 128, 2


def run(parts: Parts, setting: Setting) -> None:
    """The whole model needs gradient checkpointing, with which there are no two stages; a quarter of it does not."""
    parts.run("gradient checkpointing", partial(step, setting, setting.pick("llava-1.5-7b", "tiny"), True))
    parts.run("a quarter of the layers", partial(step, setting, setting.pick("llava-1.5-7b-quarter", "tiny"), False))


def step(setting: Setting, preset: str, gradient_checkpointing: bool) -> dict[str, object]:
    """Median seconds and peak bytes by variant, the latter above the weights."""
    batch_size = setting.pick(BATCH_SIZE, 1)
    model = train_step.build(preset, setting.device, torch.bfloat16, gradient_checkpointing)
    steps = {
        name: train_step.make_step(model, variant, batch_size, TEXT_TOKENS, NUM_VOCO_TOKENS)
        for name, variant in train_step.VARIANTS.items()
        if not (gradient_checkpointing and variant.two_stages)
        # Compiled, which a dry run is not
        and not (setting.dry_run and variant.attention == "flex_attention")
    }
    seconds, problems = train_step.take_turns(steps, setting.pick(7, 1))
    memory = {name: train_step.peak_memory(model, steps[name]) for name in seconds}
    del model, steps
    free_memory()
    return {
        "preset": preset,
        "gradient_checkpointing": gradient_checkpointing,
        "batch_size": batch_size,
        "text_tokens": TEXT_TOKENS,
        "num_voco_tokens": NUM_VOCO_TOKENS,
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "peak_bytes": memory,
        "cannot_run": problems,
    }
