"""The paper's Table 7: a question about an image, in four ways; and the first token against that of text only."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import overhead
from voco_llama_hf.benchmark.question import NO_CACHE, Question, make_networks
from voco_llama_hf.benchmark.results import count
from voco_llama_hf.benchmark.suite import Suite

from .networks import large_network, load_shape
from .record import Parts
from .setting import Setting, report


PROMPT_TOKENS = 32
BATCH_SIZES = (1, 8)
COUNTS = (1, 2, 8)


def run(parts: Parts, setting: Setting) -> None:
    for batch_size in BATCH_SIZES:
        for k in COUNTS:
            parts.run(f"k={k}, batch of {batch_size}", partial(ask, setting, k, batch_size))
    for is_static in (False, True):
        for batch_size in BATCH_SIZES:
            name = f"against text only, batch of {batch_size}{', static cache' if is_static else ''}"
            parts.run(name, partial(ask_text, setting, batch_size, is_static))
    parts.run("FLOPs", partial(count_flops, setting))


def ask(setting: Setting, k: int, batch_size: int) -> dict[str, object]:
    """Wall, event and kernel seconds and peak bytes to the first token, by way of asking."""
    rounds = setting.pick(11, 1)
    suite = Suite(large_network(setting), k, PROMPT_TOKENS, new_tokens=2, rounds=rounds, static=False, report=report)
    return {"k": k, "prompt_tokens": PROMPT_TOKENS, "rounds": rounds, "first_token": suite.first_tokens(batch_size)}


def ask_text(setting: Setting, batch_size: int, is_static: bool) -> dict[str, object]:
    """See `benchmarks/overhead.py`."""
    networks = make_networks(large_network(setting))
    networks[overhead.LLAVA] = networks[NO_CACHE]
    question = Question(networks, 1, PROMPT_TOKENS, batch_size)
    return {"static": is_static, **overhead.measure(networks, question, setting.pick(21, 1), is_static)}


def count_flops(setting: Setting) -> dict[str, object]:
    """FLOPs and bytes, counted on shapes."""
    return count(load_shape(setting), list(COUNTS), PROMPT_TOKENS, [], torch.bfloat16, report)
