"""`benchmarks/vllm_serving.py` on a GPU: its servers share one card, compute in bfloat16 and replay CUDA graphs."""

from __future__ import annotations

import torch
import typer

from benchmarks import vllm_serving


# Of the card's memory for each of the two engines of vLLM, the rest being that of `voco-llama serve`
SHARE = "0.35"
ENGINE = "vllm.entrypoints.openai.api_server"
commands = vllm_serving.commands


def on_gpu(command: list[str]) -> list[str]:
    """How a server is started on a GPU. The script's own way is for CPUs."""
    command = ["bfloat16" if word == "float32" else word for word in command if word != "--enforce-eager"]
    return [*command, "--gpu-memory-utilization", SHARE] if ENGINE in command else command


def gpu_commands(*args) -> dict[str, list[str]]:
    return {name: on_gpu(command) for name, command in commands(*args).items()}


if __name__ == "__main__":
    if torch.cuda.is_available():
        vllm_serving.commands = gpu_commands
    typer.run(vllm_serving.main)
