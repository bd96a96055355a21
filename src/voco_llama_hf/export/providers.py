"""Execution providers of ONNX Runtime, as Optimum takes them."""

from collections.abc import Sequence
from typing import Any

import onnxruntime
import torch


CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
# As ONNX Runtime has them: names, or names with options
Providers = Sequence[str | tuple[str, dict[str, Any]]]


def check_provider(provider: str) -> None:
    """
    Raises:
        ValueError: if this build of ONNX Runtime does not have the execution provider.
    """
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise ValueError(
            f"this ONNX Runtime has no {provider}, it has {', '.join(available)}: the extra export brings "
            "onnxruntime for the CPU, export-gpu brings onnxruntime-gpu for CUDA and TensorRT"
        )
    if provider in CUDA_PROVIDERS and not torch.cuda.is_available():
        raise ValueError(f"{provider} needs a PyTorch with CUDA and a GPU, to keep keys and values on the device")


def resolve_providers(
    provider: str = "CPUExecutionProvider",
    providers: Providers | None = None,
    provider_options: Sequence[dict[str, Any]] | dict[str, Any] | None = None,
) -> list[tuple[str, dict[str, Any]]]:
    """
    Providers with their options, in order of preference.

    Args:
        provider (`str`): The provider, where no `providers` are given.
        providers (`Sequence[str | tuple[str, dict]]`, *optional*): Several, the preferred one first.
        provider_options (`Sequence[dict]` or `dict`, *optional*): Options of each, or of the first.

    Raises:
        ValueError: if one is not there, or there are more or fewer options than providers.
    """
    given: list[tuple[str, dict[str, Any]]] = [
        (one, {}) if isinstance(one, str) else (one[0], dict(one[1]))
        for one in ([provider] if providers is None else providers)
    ]
    if not given:
        raise ValueError("providers is empty: name at least one")
    if isinstance(provider_options, dict):
        given[0][1].update(provider_options)
    elif provider_options is not None:
        if len(provider_options) != len(given):
            raise ValueError(f"there are {len(given)} providers, but provider_options for {len(provider_options)}")
        for (_, own), options in zip(given, provider_options):
            own.update(options)
    for name, options in given:
        check_provider(name)
        if name in CUDA_PROVIDERS:
            options.setdefault("device_id", torch.cuda.current_device())
    # What TensorRT has no operators for runs on the same device
    if [name for name, _ in given] == ["TensorrtExecutionProvider"]:
        given.append(("CUDAExecutionProvider", {"device_id": given[0][1]["device_id"]}))
    return given
