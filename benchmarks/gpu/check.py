"""`voco-llama check` on every attention in float32 and bfloat16, and compiled decoding with CUDA graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec

import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel

from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.benchmark.suite import compile_config
from voco_llama_hf.check import LAYOUT, Prompt, run_checks

from .networks import free_memory, small_network
from .record import Failed, Missing, Parts
from .setting import Setting, report


# Those that need a package, with its name
PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
NEW_TOKENS = 12
KERNELS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)


def run(parts: Parts, setting: Setting) -> None:
    """One part a combination; those that may harm the device come last."""
    for dtype in setting.pick((torch.float32, torch.bfloat16), (torch.bfloat16,)):
        for attention in ("sdpa", "eager", "flex_attention", *PACKAGES):
            if attention not in PACKAGES or dtype is torch.bfloat16:
                name = f"{attention}, {str(dtype).removeprefix('torch.')}"
                parts.run(name, partial(check, setting, attention, dtype))
    for kernel in setting.pick(KERNELS, KERNELS[:1]):
        name = f"sdpa by {kernel.name.lower()}, bfloat16"
        parts.run(name, partial(check, setting, "sdpa", torch.bfloat16, kernel))
    parts.run("CUDA graphs", partial(check_graphs, setting))


def check(
    setting: Setting, attention: str, dtype: torch.dtype, kernel: SDPBackend | None = None
) -> dict[str, float | str]:
    """
    Differences from the reference, by way of computing.

    Raises:
        Missing: if the attention needs a package, or a compiler in a dry run.
        Failed: if one differs beyond tolerance or does not run.
    """
    package = PACKAGES.get(attention)
    if package is not None and (find_spec(package) is None or setting.dry_run):
        raise Missing(f"{package} is not installed")
    if attention == "flex_attention" and setting.dry_run:
        raise Missing("flex_attention is compiled, which a dry run is not")
    model = small_network(setting, dtype)
    model.set_attn_implementation(attention)
    # Where a kernel cannot take a mask, the plain one stands in
    forced = nullcontext() if kernel is None else sdpa_kernel([kernel, SDPBackend.MATH], set_priority=True)
    with forced:
        checks = list(run_checks(model))
    free_memory()
    found: dict[str, float | str] = {result.name: result.problem or result.error for result in checks}
    bad = [result for result in checks if not result.agrees]
    if bad:
        reason = bad[0].problem or f"differs by {bad[0].error:.1e}, at most {bad[0].tolerance:g}"
        raise Failed(f"{bad[0].name}: {reason}", found)
    return found


@torch.no_grad()
def check_graphs(setting: Setting) -> dict[str, object]:
    """
    Compiled decoding gives the tokens of plain decoding, from graphs that CUDA captured.

    Raises:
        Failed: if tokens differ, or graphs are not used.
    """
    model = small_network(setting, torch.float32)
    inputs = Prompt(model, LAYOUT, seed=0).inputs(model)
    expected = answer(model, inputs)
    compiled = partial(
        answer, copy.deepcopy(model), inputs, cache_implementation="static", compile_config=compile_config()
    )
    for _ in range(3):  # compiles, captures, replays
        found = compiled()
    with counted_launches(setting) as launches:
        found = compiled()
    result = {
        "graph_launches": launches[0],
        "new_tokens": NEW_TOKENS,
        "skips": counters["inductor"]["cudagraph_skips"],
    }
    report(f"{result}, {dict(counters['graph_break'])}")
    if not torch.equal(found, expected):
        raise Failed("compiled decoding answers otherwise than plain decoding", result)
    if not setting.dry_run and launches[0] < NEW_TOKENS - 1:
        raise Failed(f"{launches[0]} launches of CUDA graphs for {NEW_TOKENS} tokens", result)
    return result


def answer(model: VoCoLlamaForConditionalGeneration, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    new = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    return model.generate(**inputs, **new, suppress_tokens=[model.config.voco_token_id], **options)


@contextmanager
def counted_launches(setting: Setting) -> Iterator[list[int]]:
    """How many CUDA graphs are launched meanwhile, in a list of one number."""
    launches = [0]
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += setting.pick([torch.profiler.ProfilerActivity.CUDA], [])
    with torch.profiler.profile(activities=activities) as profile:
        yield launches
        if not setting.dry_run:
            torch.cuda.synchronize()
    launches[0] = sum(event.count for event in profile.key_averages() if event.key.startswith("cudaGraphLaunch"))
