"""The same weights as transformers' own LLaVA."""

from typing import Any

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)


TILE_SETTINGS = ("image_grid_pinpoints", "vision_aspect_ratio")
CLASSES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}


def as_llava(model: PreTrainedModel, image_token_id: int | None = None) -> Any:
    """
    The base model, a LLaVA of whatever kind, of the same modules: the weights are shared, and whatever projects the
    image is kept.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Where the modules come from.
        image_token_id (`int`, *optional*): Token that stands for a vision token, `<voco>` by default.

    Returns:
        [`~transformers.LlavaForConditionalGeneration`], or the class of `config.base_model_type`.
    """
    config = model.config
    config_class, model_class = CLASSES[config.base_model_type]
    tiles = {name: getattr(config, name) for name in TILE_SETTINGS if getattr(config, name) is not None}
    llava_config = config_class(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.voco_token_id if image_token_id is None else image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_feature_layer=config.vision_feature_layer,
        multimodal_projector_bias=config.multimodal_projector_bias,
        **tiles,
    )
    with torch.device("meta"):
        llava = model_class(llava_config)
    for name, part in model.model.named_children():
        setattr(llava.model, name, part)
    for name, parameter in model.model.named_parameters(recurse=False):
        setattr(llava.model, name, parameter)
    llava.lm_head = model.lm_head
    llava.generation_config = model.generation_config
    return llava.eval()


__all__ = ["as_llava"]
