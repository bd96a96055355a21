"""ONNX Runtime on the GPU: parity with PyTorch, speed against it, and that keys and values stay on the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from ctypes.util import find_library
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .networks import free_memory
from .record import Failed, Missing, Parts
from .setting import Setting, report


BATCH_SIZES = [1, 8]
NUM_VOCO_TOKENS, TEXT_TOKENS, NEW_TOKENS = 2, 24, 33
SHORT, LONG = 16, 272  # tokens of text whose copies are compared
# Both of one step: keys and values copied through the host would add this share of their growth, logits add nothing
MAX_SHARE = 0.1


def run(parts: Parts, setting: Setting) -> None:
    """TensorRT builds an engine for minutes, so it has the small model, and comes last."""
    parts.run("CUDA", partial(compare, setting, "CUDAExecutionProvider", setting.pick("half-billion", "smallest")))
    parts.run("TensorRT", partial(compare, setting, "TensorrtExecutionProvider", "embedded"))


def compare(setting: Setting, provider: str, preset: str) -> dict[str, object]:
    """
    Differences from PyTorch, seconds by task, and bytes copied between host and card.

    Raises:
        Missing: if ONNX Runtime or the provider is not here.
        Failed: if keys and values leave the card.
    """
    if find_spec("onnxruntime") is None or find_spec("onnxscript") is None:
        raise Missing("onnxruntime or onnxscript is not installed: the extra export-gpu brings them")
    import onnxruntime

    from benchmarks import onnx_runtime

    if provider.startswith("Tensorrt") and (setting.dry_run or not has_tensorrt()):
        raise Missing("TensorRT is not installed")
    provider = setting.pick(provider, "CPUExecutionProvider")
    if provider not in onnxruntime.get_available_providers():
        raise Missing(f"this ONNX Runtime has no {provider}: the extra export-gpu brings onnxruntime-gpu")
    precision = setting.pick("fp16", "fp32")
    if not setting.dry_run:
        onnxruntime.preload_dlls()  # CUDA and cuDNN as PyTorch brought them
    with onnx_runtime.prepared(preset, precision, provider, fused=not setting.dry_run, progress=report) as (
        models,
        parity,
    ):
        rounds, new_tokens = setting.pick((11, NEW_TOKENS), (1, 3))
        sizes = (setting.pick(BATCH_SIZES, [1]), NUM_VOCO_TOKENS, TEXT_TOKENS, new_tokens, rounds)
        records = onnx_runtime.compare(models, *sizes)
        result: dict[str, object] = {
            "preset": preset,
            "precision": precision,
            "provider": provider,
            "num_voco_tokens": NUM_VOCO_TOKENS,
            "text_tokens": TEXT_TOKENS,
            "new_tokens": new_tokens,
            "rounds": rounds,
            "by_batch_size": records,
            "parity": [vars(difference) for difference in parity.differences],
            "copies": copies(models["onnxruntime"], onnx_runtime.make_calls),
        }
        del models
    free_memory()
    check_copies(result)
    return result


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
