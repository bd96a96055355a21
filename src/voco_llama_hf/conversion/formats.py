"""Which formats are known, and the choice of one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from ..modeling.configuration_voco_llama import VoCoLlamaConfig
from .authors import read_authors_checkpoint
from .checkpoint import Checkpoint, check_embedding
from .llava_hf import read_llava_hf_checkpoint
from .source_files import read_json


@dataclass(frozen=True)
class SourceFormat:
    """
    A format that is converted from.

    Args:
        title (`str`):
            What people call it.
        read (`Callable`):
            From the folder, the content of its `config.json` and the vision tower given to a [`Checkpoint`].
    """

    title: str
    read: Callable[[Path, dict[str, Any], str | Path | None], Checkpoint]


# By model type; a new format is a file beside this one and a line here
FORMATS = {
    "llava_llama": SourceFormat("the authors' format", read_authors_checkpoint),
    "llava": SourceFormat("llava-hf", read_llava_hf_checkpoint),
    "llava_next": SourceFormat("llava-hf", read_llava_hf_checkpoint),
    "llava_onevision": SourceFormat("llava-hf", read_llava_hf_checkpoint),
}


def read_checkpoint(source: Path, vision_tower: str | Path | None) -> Checkpoint:
    """Reads the configuration and maps the weights of a checkpoint in one of the formats known."""
    if not (source / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}; a checkpoint folder with {CONFIG_NAME} was expected")
    config = read_json(source / CONFIG_NAME)
    model_type = config.get("model_type")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source} is quantized; a checkpoint with float weights was expected")
    if model_type == VoCoLlamaConfig.model_type:
        raise ValueError(f"{source} already is a {model_type} checkpoint; there is nothing to convert")
    if model_type not in FORMATS:
        known = " or ".join(f"{name!r} ({source_format.title})" for name, source_format in FORMATS.items())
        raise ValueError(f"{source / CONFIG_NAME} has model_type {model_type!r}; {known} was expected")
    checkpoint = FORMATS[model_type].read(source, config, vision_tower)
    check_embedding(checkpoint)
    return checkpoint
