"""Which precision a training is fast in."""

import torch


def is_bfloat16_fast() -> bool:
    """Whether bfloat16 is worth training in: on CPUs without AVX-512 it is up to fifty times slower than float32."""
    return torch.accelerator.is_available() or torch.backends.cpu.get_cpu_capability() == "AVX512"


__all__ = ["is_bfloat16_fast"]
