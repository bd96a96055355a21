"""The models that stages run, and how much of the card they get."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from voco_llama_hf.benchmark.presets import PRESETS, build_model
from voco_llama_hf.loading import load_config, load_model

from .setting import Setting


# Of a card with 24 GiB, the rest being CUDA's own
SMALL_CARD = 23.5


def preset(setting: Setting) -> str:
    return setting.pick("llava-1.5-7b", "tiny")


def load_shape(setting: Setting) -> VoCoLlamaConfig:
    return PRESETS[preset(setting)]() if setting.model is None else load_config(setting.model)


@lru_cache(maxsize=1)
def large_network(setting: Setting) -> VoCoLlamaForConditionalGeneration:
    """The model in bfloat16, on the device; a stage has one."""
    if setting.model is not None:
        return load_model(setting.model, dtype=torch.bfloat16).to(setting.device)
    return build_model(load_shape(setting), setting.device, torch.bfloat16)


def small_network(setting: Setting, dtype: torch.dtype) -> VoCoLlamaForConditionalGeneration:
    """The model, in place of random weights the embedded checkpoint, whose answers depend on what it sees."""
    return load_model(setting.model or EMBEDDED_CHECKPOINT, dtype=dtype).to(setting.device)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_limit(gib: float) -> Iterator[None]:
    """Meanwhile this process gets no more of the card; what it asks for beyond is an error, as on a smaller card."""
    if not torch.cuda.is_available():
        yield
        return
    free_memory()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    torch.cuda.reset_peak_memory_stats()
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        free_memory()


def peak_memory() -> int | None:
    """Bytes of tensors at the worst moment since [`memory_limit`] began; `None` without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
