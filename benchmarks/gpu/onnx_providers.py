"""ONNX Runtime on the GPU: parity with PyTorch, speed against it, and that keys and values stay on the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from ctypes.util import find_library
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .record import Failed, Missing, Parts
from .setting import Setting, report


BATCH_SIZES = [1, 8]
NUM_VOCO_TOKENS, TEXT_TOKENS, NEW_TOKENS = 2, 24, 33
SHORT, LONG = 16, 272  # tokens of text whose copies are compared
# Both of one step: keys and values copied through the host would add this share of their growth, logits add nothing
MAX_SHARE = 0.1


def run(parts: Parts, setting: Setting) -> None:
    """Compiling takes long and comes after; TensorRT builds an engine for minutes, and has the small model."""
    with ExitStack() as stack:
        # Exported by the first part that needs it
        exported = lru_cache(lambda: export(stack, setting, "CUDAExecutionProvider", "half-billion"))
        parts.run("CUDA", lambda: compare(setting, exported()))
        parts.run("CUDA, compiled", lambda: compare_compiled(setting, exported()))
    with ExitStack() as stack:
        parts.run(
            "TensorRT", lambda: compare(setting, export(stack, setting, "TensorrtExecutionProvider", "embedded"))
        )


@dataclass
class Exported:
    """
    Args:
        models (`dict`): The same weights in PyTorch and ONNX Runtime.
        parity (`ExportReport`): How far the graphs are from PyTorch.
        preset, precision, provider (`str`): What was exported, and for whom.
    """

    models: dict[str, Any]
    parity: Any
    preset: str
    precision: str
    provider: str


def export(stack: ExitStack, setting: Setting, provider: str, preset: str) -> Exported:
    """
    Graphs that live as long as the stack.

    Raises:
        Missing: if ONNX Runtime or the provider is not here.
    """
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        raise Missing("onnxruntime or onnxscript is not installed: the extra export-gpu brings them")
    import onnxruntime

    from benchmarks import onnx_runtime

    if provider.startswith("Tensorrt") and (setting.dry_run or not has_tensorrt()):
        raise Missing("TensorRT is not installed")
    chosen = setting.pick((preset, "fp16", provider), ("smallest", "fp32", "CPUExecutionProvider"))
    if chosen[2] not in onnxruntime.get_available_providers():
        raise Missing(f"this ONNX Runtime has no {provider}: the extra export-gpu brings onnxruntime-gpu")
    if not setting.dry_run:
        onnxruntime.preload_dlls()  # CUDA and cuDNN as PyTorch brought them
    options = {"fused": not setting.dry_run, "progress": report}
    models, parity = stack.enter_context(onnx_runtime.prepared(*chosen, **options))
    return Exported(models, parity, *chosen)


def compare(setting: Setting, exported: Exported) -> dict[str, object]:
    """
    Differences from PyTorch, seconds by task, and bytes copied between host and card.

    Raises:
        Failed: if keys and values leave the card.
    """
    from benchmarks import onnx_runtime

    result = {
        **measure(setting, exported, exported.models),
        "parity": [vars(difference) for difference in exported.parity.differences],
        "copies": copies(exported.models["onnxruntime"], onnx_runtime.make_calls),
    }
    check_copies(result)
    return result


def compare_compiled(setting: Setting, exported: Exported) -> dict[str, object]:
    """Seconds by task against PyTorch with compiled layers."""
    from benchmarks import onnx_runtime

    network = onnx_runtime.build(exported.preset, exported.precision, setting.device)
    models = {
        "compiled": onnx_runtime.compile_layers(network),
        "onnxruntime": exported.models["onnxruntime"],
    }
    return measure(setting, exported, models)


def measure(setting: Setting, exported: Exported, models: dict[str, Any]) -> dict[str, object]:
    from benchmarks import onnx_runtime

    rounds, new_tokens = setting.pick((11, NEW_TOKENS), (1, 3))
    sizes = setting.pick(BATCH_SIZES, [1])
    return {
        "preset": exported.preset,
        "precision": exported.precision,
        "provider": exported.provider,
        "num_voco_tokens": NUM_VOCO_TOKENS,
        "text_tokens": TEXT_TOKENS,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "by_batch_size": onnx_runtime.compare(models, sizes, NUM_VOCO_TOKENS, TEXT_TOKENS, new_tokens, rounds),
    }


def has_tensorrt() -> bool:
    return find_spec("tensorrt") is not None or find_library("nvinfer") is not None


@torch.no_grad()
def copies(model, make_calls: Callable[..., dict]) -> dict[str, int]:
    """Bytes that generating copies between host and card, behind a short text and behind a long one."""
    found = {}
    for length in (SHORT, LONG):
        call = make_calls(model, 1, NUM_VOCO_TOKENS, length, 9)["token"]
        call()
        found[str(length)] = copied_bytes(call)
    layers, heads, head_dim = (
        model.config.text_config.num_hidden_layers,
        model.config.text_config.num_key_value_heads,
        model.config.text_config.head_dim,
    )
    size = torch.empty(0, dtype=model.dtype).element_size()
    return {**found, "key_value_bytes": 2 * layers * heads * head_dim * size * (LONG - SHORT)}


def copied_bytes(call: Callable[[], object]) -> int:
    """Bytes that a call copies between host and card, as CUDA's own profiler sees them, whoever copies."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memcpys = [event for event in events if event.get("cat") == "gpu_memcpy"]
    between = [event for event in memcpys if "HtoD" in event["name"] or "DtoH" in event["name"]]
    return sum(int(event["args"]["bytes"]) for event in between)


def check_copies(result: dict) -> None:
    """
    Raises:
        Failed: if a longer past copies more, by more than a trace of its keys and values.
    """
    counted = result["copies"]
    grown, cached = counted[str(LONG)] - counted[str(SHORT)], counted["key_value_bytes"]
    if grown > MAX_SHARE * cached:
        raise Failed(f"{grown:,} bytes more are copied for {cached:,} bytes more of keys and values", result)
