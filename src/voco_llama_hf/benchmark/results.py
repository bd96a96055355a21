"""What a file of results holds besides measurements: where they come from, and the costs that are counted."""

import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from .flops import count_compression, count_costs, make_meta_networks
from .question import FULL_CACHE, VOCO_CACHE


def about(name: str, model: VoCoLlamaForConditionalGeneration | None, dtype: torch.dtype) -> dict[str, Any]:
    """Date, command, hardware and versions; without a model nothing was measured."""
    return {
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": "meta device" if model is None else hardware(model.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
    }


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {os.cpu_count()} cores"


def count(
    config: VoCoLlamaConfig,
    num_voco_tokens: list[int],
    prompt_tokens: int,
    images: list[int],
    dtype: torch.dtype,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Costs on shapes alone: of one question, of compressing, and of many images."""
    report("Counting FLOPs and bytes")
    networks = make_meta_networks(config, dtype)
    costs = {str(k): count_costs(networks, k, prompt_tokens) for k in num_voco_tokens}
    compression = {str(k): count_compression(networks, k) for k in num_voco_tokens}
    many = []
    for number in images:
        report(f"Counting FLOPs and bytes of {number:,} images")
        counted = count_costs(networks, num_voco_tokens[0], prompt_tokens, number)
        many.append({"num_images": number, **{way: asdict(counted[way]) for way in (FULL_CACHE, VOCO_CACHE)}})
    return {
        "num_voco_tokens": num_voco_tokens,
        "costs": {k: {way: asdict(cost) for way, cost in by_way.items()} for k, by_way in costs.items()},
        "compression_flops": {k: {"compress": ours, "bare passes": bare} for k, (ours, bare) in compression.items()},
        "many_images_costs": many,
        "weight_bytes": sum(weight.nbytes for weight in networks[VOCO_CACHE].parameters()),
    }
