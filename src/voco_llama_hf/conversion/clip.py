"""CLIP models that are vision towers of checkpoints which do not hold them."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, CLIPVisionModel

from .checkpoint import VISION_TOWER
from .loading import quiet, some
from .source_files import as_value_error


def load_clip_config(tower: str | Path) -> CLIPVisionConfig:
    """
    The configuration of a vision tower. The shapes of its weights do not tell it: they show neither the number of
    attention heads nor the activation.
    """
    with as_value_error(
        f"the configuration of the vision tower {tower} cannot be loaded; "
        "pass vision_tower, the folder or hub id of the CLIP model"
    ):
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    if isinstance(config, CLIPConfig):
        config = config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(f"the vision tower {tower} is of type {config.model_type!r}; a CLIP model was expected")
    return config


def load_clip_weights(tower: str | Path, config: CLIPVisionConfig) -> dict[str, torch.Tensor]:
    """The weights of a vision tower that the checkpoint does not hold."""
    with quiet(), as_value_error(f"the vision tower {tower} cannot be loaded; pass vision_tower"):
        loaded: Any = CLIPVisionModel.from_pretrained(tower, config=config, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"the vision tower {tower} lacks {some(info['missing_keys'])}")
    return {VISION_TOWER + name: tensor for name, tensor in model.state_dict().items()}
