"""A model by its folder or Hub id, be it a whole one or PEFT adapters on a base model."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from .modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor


if TYPE_CHECKING:
    from peft import PeftModel

PROCESSOR_FILE = "processor_config.json"


class Base(NamedTuple):
    """
    The model that adapters were trained on.

    Args:
        name (`str`): Folder or Hub id.
        revision (`str`): Branch, tag or commit on the Hub.
    """

    name: str
    revision: str


def default_device() -> torch.device:
    """The accelerator if there is one, as the trainer takes it."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def is_hub_id(name: str) -> bool:
    """Whether `name` can be that of a model on the Hub; without an owner, a folder of this name comes first."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name or not os.path.exists(name)


def is_adapter_folder(folder: str | os.PathLike) -> bool:
    """Whether a folder holds PEFT adapters."""
    return os.path.isfile(os.path.join(folder, ADAPTER_CONFIG_NAME))


def find_base(name: str, revision: str = "main") -> Base | None:
    """
    Args:
        name (`str`): Folder or Hub id of adapters or of a whole model.
        revision (`str`): Branch, tag or commit on the Hub.

    Returns:
        [`Base`], *optional*: what the adapters were trained on; `None` for a whole model.

    Raises:
        ValueError: if the adapters name no base model, or one that cannot be found.
    """
    path = find_adapter_config_file(name, revision=revision)
    if path is None:
        return None
    with loading(f"{ADAPTER_CONFIG_NAME} of {name}"):
        config = json.loads(Path(path).read_text())
        base, base_revision = config.get("base_model_name_or_path"), config.get("revision") or "main"
    if not isinstance(base, str) or not isinstance(base_revision, str) or not base:
        raise ValueError(f"the adapters {name} name no base model: {ADAPTER_CONFIG_NAME} has {base!r}")
    # What comes from the Hub was made on another machine, whose folders mean nothing here
    is_here = os.path.isdir(name) and os.path.isdir(base)
    if not is_here and not is_hub_id(base):
        raise ValueError(
            f"the adapters {name} were trained on {base}, which is not here: write the folder or the Hub id of that "
            f"model as base_model_name_or_path into their {ADAPTER_CONFIG_NAME}"
        )
    if is_adapter_folder(base):
        raise ValueError(f"the adapters {name} were trained on {base}, which are adapters too: merge those first")
    return Base(base, base_revision)


def load_config(name: str) -> VoCoLlamaConfig:
    """
    The configuration of a model, of adapters that of their base model.

    Raises:
        ValueError: if there is none, or it is not that of a VoCo-LLaMA.
    """
    base = find_base(name) or Base(name, "main")
    check_config(*base)
    with loading(f"the configuration of {base.name}"):
        return VoCoLlamaConfig.from_pretrained(base.name, revision=base.revision)


def check_config(name: str, revision: str = "main") -> None:
    """
    Raises:
        ValueError: if a checkpoint is not a VoCo-LLaMA.
    """
    with loading(f"the configuration of {name}"):
        config, _ = VoCoLlamaConfig.get_config_dict(name, revision=revision)
    model_type = config.get("model_type")
    if model_type in ("llava", "llava_llama"):
        raise ValueError(f"{name} is a {model_type} checkpoint: run voco-llama convert {name} TARGET first")
    if model_type != VoCoLlamaConfig.model_type:
        raise ValueError(f"{name} is a {model_type} model, not a {VoCoLlamaConfig.model_type} one")
    # Without them transformers would fill in a model of 7 billion random weights
    if missing := [part for part in ("text_config", "vision_config") if part not in config]:
        raise ValueError(f"the configuration of {name} has no {missing[0]}")


def load_processor(name: str, revision: str = "main") -> VoCoLlamaProcessor:
    """
    The processor of a model; adapters that were saved without one have that of their base model.

    Raises:
        ValueError: if it is missing or damaged.
    """
    base = find_base(name, revision)
    if base is not None and os.path.isdir(name) and not os.path.isfile(os.path.join(name, PROCESSOR_FILE)):
        name, revision = base
    with loading(f"the processor of {name}"):
        return VoCoLlamaProcessor.from_pretrained(name, revision=revision)


def load_model(
    name: str, merge: bool = False, revision: str = "main", **kwargs: Any
) -> VoCoLlamaForConditionalGeneration:
    """
    Loads a model, whole or as adapters on a base model, ready to run.

    Args:
        name (`str`):
            Folder or Hub id of a model or of PEFT adapters.
        merge (`bool`, *optional*, defaults to `False`):
            Whether adapters are added to the weights, as exporting and saving a whole model need it. Otherwise they
            stay layers of their own, and compressed images fit [`~peft.PeftModel`]s of the same adapters.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        kwargs:
            What `from_pretrained` takes.

    Returns:
        [`VoCoLlamaForConditionalGeneration`], in evaluation mode.

    Raises:
        ImportError: if PEFT is needed and not installed.
        ValueError: if it is not a VoCo-LLaMA, or weights are missing, damaged or of another shape.
    """
    if find_base(name, revision) is None:
        return load_whole(name, revision, **kwargs).eval()
    model = load_adapters(name, revision=revision, **kwargs)
    network: Any = model.get_base_model()
    if merge:
        with loading(f"the adapters {name}"):
            network = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    return network.eval()


def load_whole(name: str, revision: str = "main", **kwargs: Any) -> VoCoLlamaForConditionalGeneration:
    """[`load_model`] of what is no adapter."""
    check_config(name, revision)
    with loading(f"the model {name}"):
        # What does not fit is told apart below, in one line
        loaded: Any = VoCoLlamaForConditionalGeneration.from_pretrained(
            name, revision=revision, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    model, info = loaded
    if misfits := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        raise ValueError(f"{len(misfits)} weights of {name} are missing or have another shape, first {misfits[0]}")
    return model


def load_adapters(name: str, is_trainable: bool = False, revision: str = "main", **kwargs: Any) -> PeftModel:
    """
    Loads adapters on their base model.

    Args:
        name (`str`): Folder or Hub id of the adapters.
        is_trainable (`bool`, *optional*, defaults to `False`): Whether to go on training them.
        revision (`str`): Branch, tag or commit on the Hub.
        kwargs: What `from_pretrained` of the base model takes.

    Raises:
        ImportError: if PEFT is not installed.
        ValueError: if adapters or base model are missing or damaged, or the adapters change more than layers.
    """
    from peft import PeftConfig, PeftModel

    base = find_base(name, revision)
    if base is None:
        raise ValueError(f"{name} has no {ADAPTER_CONFIG_NAME}")
    with loading(f"the adapters {name}"):
        is_prompt_learning = PeftConfig.from_pretrained(name, revision=revision).is_prompt_learning
    if is_prompt_learning:
        raise ValueError(f"{name} holds learned prompts: VoCo-LLaMA takes adapters that change layers, as LoRA does")
    model = load_whole(base.name, base.revision, **kwargs)
    # The number that the adapters were trained for first
    model.config.num_voco_tokens = load_processor(name, revision).num_voco_tokens
    options: dict[str, Any] = {"is_trainable": is_trainable, "revision": revision}
    with loading(f"the adapters {name}"), warnings.catch_warnings():
        # Adapters of another model than their base
        warnings.filterwarnings("error", "Found missing adapter keys")
        # In training they are kept in float32, as TRL does
        return PeftModel.from_pretrained(model, name, autocast_adapter_dtype=is_trainable, **options)


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


__all__ = [
    "find_base",
    "is_adapter_folder",
    "is_hub_id",
    "load_adapters",
    "load_config",
    "load_model",
    "load_processor",
    "load_whole",
]
