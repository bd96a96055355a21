"""What a file of results says about where it was measured, found out without starting CUDA."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata


PACKAGES = (
    *("voco-llama-hf", "torch", "transformers", "triton", "accelerate", "trl", "peft", "bitsandbytes", "deepspeed"),
    *("flash-attn", "onnxruntime", "onnxruntime-gpu", "tensorrt", "vllm"),
)


NO_CARD = {"card": None, "memory": None, "driver": None}


def machine(dry_run: bool = False) -> dict:
    """Card, its memory, driver, and versions; a dry run has no card."""
    return {**NO_CARD, **({} if dry_run else find_card() or {}), "versions": versions()}


def find_card() -> dict[str, str] | None:
    """The first GPU that is visible, `None` without one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    if not visible.startswith("MIG"):  # a part of the only card there is, which nvidia-smi does not know by this name
        query += ["--id", visible]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    name, memory, driver = (part.strip() for part in printed.splitlines()[0].split(","))
    return {"card": name, "memory": memory, "driver": driver}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def folder_name(card: str) -> str:
    """A card's name as that of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
