"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .compat_voco_llama import NamesOfCache


@dataclass
class VoCoLlamaModelOutputWithPast(NamesOfCache, BaseModelOutputWithPast):
    """
    [`~transformers.modeling_outputs.BaseModelOutputWithPast`], aligned with the short sequence, and:

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, V, hidden_size)`, *optional*):
            Vision tokens as the text model reads them, returned by a single pass; `(num_vision_tokens, hidden_size)`,
            image after image, where each has a number of its own. Those of every place, with `image_indices`.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class VoCoLlamaCausalLMOutputWithPast(NamesOfCache, CausalLMOutputWithPast):
    """
    [`~transformers.modeling_outputs.CausalLMOutputWithPast`], aligned with the short sequence, and:

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, V, hidden_size)`, *optional*):
            See [`VoCoLlamaModelOutputWithPast`].
    """

    image_hidden_states: torch.Tensor | None = None


__all__ = ["VoCoLlamaCausalLMOutputWithPast", "VoCoLlamaModelOutputWithPast"]
