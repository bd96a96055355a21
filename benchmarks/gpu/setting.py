"""What every stage is told: at which shape, with which model, where to write."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from voco_llama_hf.benchmark.presets import PRESETS, build_model
from voco_llama_hf.loading import load_config, load_model


T = TypeVar("T")
# Of a card with 24 GiB, the rest being CUDA's own
SMALL_CARD = 23.5


@dataclass
class Setting:
    """
    Args:
        dry_run (`bool`): Whether everything is tiny and runs on the CPU.
        model (`str`, *optional*): Folder or Hub id of a model, instead of random weights at LLaVA-1.5-7B's shape.
        work_dir (`Path`): Folder of weights and data that stages leave for a second run.
    """

    dry_run: bool
    model: str | None
    work_dir: Path

    def pick(self, full: T, tiny: T) -> T:
        """The one or, in a dry run, the other."""
        return tiny if self.dry_run else full

    @property
    def device(self) -> torch.device:
        return torch.device(self.pick("cuda", "cpu"))

    @property
    def preset(self) -> str:
        return self.pick("llava-1.5-7b", "tiny")

    @property
    def config(self) -> VoCoLlamaConfig:
        return PRESETS[self.preset]() if self.model is None else load_config(self.model)

    @cached_property
    def network(self) -> VoCoLlamaForConditionalGeneration:
        """The model in bfloat16, on the device."""
        if self.model is not None:
            return load_model(self.model, dtype=torch.bfloat16).to(self.device)
        return build_model(self.config, self.device, torch.bfloat16)

    def small_network(self, dtype: torch.dtype) -> VoCoLlamaForConditionalGeneration:
        """The model, in place of random weights the embedded checkpoint, whose answers depend on what it sees."""
        return load_model(self.model or EMBEDDED_CHECKPOINT, dtype=dtype).to(self.device)


def report(text: str) -> None:
    """A line for the log, from a library that tells what it does."""
    print(text, flush=True)


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
    """Bytes that were reserved at the worst moment since [`memory_limit`] began; `None` without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
