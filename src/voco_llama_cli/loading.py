"""Loading of the model a command runs, with every check before and no noise from transformers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .errors import UsageProblem
from .options import Dtype


if TYPE_CHECKING:
    import torch

    from voco_llama_hf.modeling import VoCoLlamaProcessor


def find_model(name: str | None) -> str:
    """
    The folder or Hub id of a model; cheap, so that a typing error does not wait for torch.

    Raises:
        UsageProblem: if there is no such folder, or it holds no model.
    """
    if name is None:
        from voco_llama_hf import EMBEDDED_CHECKPOINT

        return EMBEDDED_CHECKPOINT
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UsageProblem(f"{name} is not a model folder: it has no config.json")
    elif os.path.exists(name):
        raise UsageProblem(f"{name} is a file: --model takes a model folder or a Hub id")
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UsageProblem(f"no such model folder: {name!r}")
    return name


def load_model(name: str, device: str | None, dtype: Dtype | None) -> tuple[Any, VoCoLlamaProcessor]:
    """
    Loads a [`VoCoLlamaForConditionalGeneration`], ready to run, and its processor.

    Raises:
        UsageProblem: if the device is unknown or is not there.
        ValueError: if the model is not a VoCo-LLaMA, lacks its processor or weights, or is damaged.
    """
    with Console(stderr=True).status(f"Loading {Path(name).name}"):
        silence_transformers()
        from voco_llama_hf.modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor

        torch_device = find_device(device)
        check_config(name)
        with loading(f"the processor of {name}"):
            processor = VoCoLlamaProcessor.from_pretrained(name)
        with loading(f"the model {name}"):
            # What does not fit is told apart below, in one line
            loaded: Any = VoCoLlamaForConditionalGeneration.from_pretrained(
                name,
                dtype="auto" if dtype is None else dtype.value,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        model, info = loaded
        if misfits := sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]):
            raise ValueError(f"{len(misfits)} weights of {name} are missing or have another shape, first {misfits[0]}")
        return model.to(torch_device).eval(), processor


def check_config(name: str) -> None:
    """
    Raises:
        ValueError: if a checkpoint is not a VoCo-LLaMA.
    """
    from voco_llama_hf.modeling import VoCoLlamaConfig

    with loading(f"the configuration of {name}"):
        config, _ = VoCoLlamaConfig.get_config_dict(name)
    model_type = config.get("model_type")
    if model_type in ("llava", "llava_llama"):
        raise ValueError(f"{name} is a {model_type} checkpoint: run voco-llama convert {name} TARGET first")
    if model_type != VoCoLlamaConfig.model_type:
        raise ValueError(f"{name} is a {model_type} model, not a {VoCoLlamaConfig.model_type} one")
    # Without them transformers would fill in a model of 7 billion random weights
    if missing := [part for part in ("text_config", "vision_config") if part not in config]:
        raise ValueError(f"the configuration of {name} has no {missing[0]}")


def find_device(name: str | None) -> torch.device:
    """
    The device named, by default the accelerator if there is one.

    Raises:
        UsageProblem: if there is no such device.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    devices = ["cpu"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if name not in devices and not (accelerator is not None and name == accelerator.type):
        raise UsageProblem(f"no device {name!r} here, there is {' and '.join(devices)}")
    return torch.device(name)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes transformers raise into one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {first_sentence(error)}") from error


def first_sentence(error: Exception) -> str:
    """What happened, without the advice that follows."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".") or type(error).__name__


def silence_transformers() -> None:
    """No warnings and no bars while weights load; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils import logging

    set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()
