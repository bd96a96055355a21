"""The same weights as transformers' own LLaVA."""

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel


def as_llava(model: PreTrainedModel, image_token_id: int | None = None) -> LlavaForConditionalGeneration:
    """
    A LLaVA of the same modules: the weights are shared, and whatever projects the image is kept.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Where the modules come from.
        image_token_id (`int`, *optional*): Token that stands for a vision token, `<voco>` by default.

    Returns:
        [`~transformers.LlavaForConditionalGeneration`]
    """
    config = model.config
    llava_config = LlavaConfig(
        vision_config=config.vision_config,
        text_config=config.text_config,
        image_token_index=config.voco_token_id if image_token_id is None else image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        vision_feature_layer=config.vision_feature_layer,
        multimodal_projector_bias=config.multimodal_projector_bias,
    )
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config)
    for name, part in model.model.named_children():
        setattr(llava.model, name, part)
    llava.lm_head = model.lm_head
    llava.generation_config = model.generation_config
    return llava.eval()


__all__ = ["as_llava"]
