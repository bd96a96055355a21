"""Tokens a second behind the first one, plain and compiled, against reading the weights once in the same run."""

from __future__ import annotations

from functools import partial

from voco_llama_hf.benchmark.suite import Suite

from .networks import large_network
from .record import Parts
from .setting import Setting, report


PROMPT_TOKENS, NEW_TOKENS = 32, 65
BATCH_SIZES = (1, 8)


def run(parts: Parts, setting: Setting) -> None:
    for is_static in (False, True):
        for batch_size in BATCH_SIZES:
            name = f"{'static cache, compiled' if is_static else 'dynamic cache'}, batch of {batch_size}"
            parts.run(name, partial(decode, setting, is_static, batch_size))


def decode(setting: Setting, is_static: bool, batch_size: int) -> dict[str, object]:
    """Tokens a second by way of asking, and seconds to read the weights."""
    rounds, new_tokens = setting.pick(3, 1), setting.pick(NEW_TOKENS, 3)
    suite = Suite(large_network(setting), 1, PROMPT_TOKENS, new_tokens, rounds, is_static, report)
    reading = suite.weight_reading()
    return {"new_tokens": new_tokens, "weight_reading": reading, "decoding": suite.decoding(batch_size)}
