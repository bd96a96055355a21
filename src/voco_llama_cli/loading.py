"""Loading of the model a command runs, with every check before and no noise from transformers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .errors import UsageProblem
from .options import Dtype, check_extra


if TYPE_CHECKING:
    import torch

    from voco_llama_hf.modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor

# Of a whole model, and of PEFT adapters
CONFIG_FILES = ("config.json", "adapter_config.json")
PACKAGE = Path(__file__).parents[1] / "voco_llama_hf"
SHIPPED = PACKAGE / "checkpoints"


def find_model(name: str | None) -> str:
    """
    The folder or Hub id of a model, also by the name of one that the package ships; cheap, so that a typing error does
    not wait for torch.

    Raises:
        UsageProblem: if there is no such folder, or it holds no model.
    """
    if name is None:
        from voco_llama_hf import EMBEDDED_CHECKPOINT

        return EMBEDDED_CHECKPOINT
    if os.path.isdir(name):
        if not any(os.path.isfile(os.path.join(name, file)) for file in CONFIG_FILES):
            raise UsageProblem(f"{name} is not a model folder: it has no {' and no '.join(CONFIG_FILES)}")
    elif os.path.exists(name):
        raise UsageProblem(f"{name} is a file: --model takes a model folder or a Hub id")
    elif re.fullmatch(r"[\w-]+", name) and (SHIPPED / name).is_dir():
        return str(SHIPPED / name)
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UsageProblem(f"no such model folder: {name!r}")
    return name


def load_model(
    name: str, device: str | None, dtype: Dtype | None, merge: bool = False
) -> tuple[VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor]:
    """
    Loads a [`VoCoLlamaForConditionalGeneration`], ready to run, and its processor.

    Args:
        merge (`bool`, *optional*, defaults to `False`): Whether adapters are added to the weights.

    Raises:
        UsageProblem: if the device is unknown or is not there, or PEFT is needed and not installed.
        ValueError: if the model is not a VoCo-LLaMA, lacks its processor or weights, or is damaged.
    """
    with Console(stderr=True).status(f"Loading {Path(name).name}"):
        silence_transformers()
        from voco_llama_hf import loading

        torch_device = find_device(device)
        if loading.find_base(name) is not None:
            check_extra("an adapter", "train", ["peft"])
        loading.load_config(name)
        processor = loading.load_processor(name)
        # Its `to` is annotated by transformers as a plain function
        network: Any = loading.load_model(name, merge, dtype="auto" if dtype is None else dtype.value)
        return network.to(torch_device), processor


def find_device(name: str | None) -> torch.device:
    """
    The device named, by default the accelerator if there is one.

    Raises:
        UsageProblem: if there is no such device.
    """
    import torch

    from voco_llama_hf.loading import default_device

    if name is None:
        return default_device()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = ["cpu"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if name not in devices and not (accelerator is not None and name == accelerator.type):
        raise UsageProblem(f"no device {name!r} here, there is {' and '.join(devices)}")
    return torch.device(name)


def silence_transformers() -> None:
    """No warnings and no bars while weights load; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers.utils import logging

    set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()


def check_reads_images_whole(processor: VoCoLlamaProcessor) -> None:
    """
    Raises:
        UsageProblem: if a model was trained for VoCo tokens of every tile, which is not how it is asked.
    """
    if processor.num_voco_tokens_per_tile is not None:
        raise UsageProblem(
            "this model was trained for VoCo tokens of every tile, and images are read whole here: give "
            "--num-voco-tokens to read them so"
        )
