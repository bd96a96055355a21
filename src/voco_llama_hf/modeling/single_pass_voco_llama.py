"""
The first way to compute: every image gets its vision tokens in the sequence, which runs once under the attention rule,
and what was computed is gathered back to the short sequence. For training and scoring.
"""

from typing import TYPE_CHECKING

import torch
from transformers.masking_utils import and_masks

from .attention_voco_llama import create_ruled_mask, group_positions, text_group_function, voco_mask_function
from .layout_voco_llama import ExpandedLayout, VoCoRuns, lay_out
from .outputs_voco_llama import VoCoLlamaModelOutputWithPast


if TYPE_CHECKING:
    from .modeling_voco_llama import VoCoLlamaModel


def run_single_pass(
    model: "VoCoLlamaModel",
    inputs_embeds: torch.Tensor,
    vision: torch.Tensor | list[torch.Tensor],
    voco_mask: torch.Tensor,
    num_voco_tokens: int | list[int] | torch.Tensor | None,
    mode: str,
    text_groups: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    **kwargs,
) -> VoCoLlamaModelOutputWithPast:
    """
    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The short sequence.
        vision (`torch.Tensor` of shape `(num_images, V, hidden_size)`, or a list of `(V, hidden_size)`):
            Vision tokens of all images.
        voco_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            True at `<voco>` tokens.
        num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
            VoCo tokens of every image, or of each.
        mode (`str`):
            `"voco"`, `"causal"` or `"uncompressed"`.
        text_groups, attention_mask, position_ids:
            See [`VoCoLlamaModel.forward`].
        kwargs:
            Further arguments of the text model.
    """
    batch_size, short_length, hidden_size = inputs_embeds.shape
    if isinstance(vision, torch.Tensor):
        num_vision = [vision.shape[1]] * vision.shape[0]
    else:
        num_vision, vision = [len(tokens) for tokens in vision], torch.cat(vision)
    vision = vision.to(inputs_embeds)
    prefix = model.embed_ids(model.config.vision_prefix_token_ids).to(inputs_embeds)
    suffix = model.embed_ids(model.config.vision_suffix_token_ids).to(inputs_embeds)
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, short_length, dtype=torch.bool, device=inputs_embeds.device)
    runs, layout = lay_out(voco_mask, num_voco_tokens, attention_mask, len(prefix), num_vision, len(suffix), mode)

    by_token = layout.short[..., None].expand(-1, -1, hidden_size)
    embeds = inputs_embeds.new_zeros(batch_size, layout.length, hidden_size).scatter(1, by_token, inputs_embeds)
    embeds = embeds.index_put((runs.rows[layout.vision_images], layout.vision), vision.reshape(-1, hidden_size))
    embeds = embeds.index_put((layout.prefix_rows[:, None], layout.prefix), prefix)
    embeds = embeds.index_put((runs.rows[:, None], layout.suffix), suffix[: layout.suffix.shape[1]])
    mask, positions = _mask_and_positions(model, embeds, layout, runs, mode, text_groups, attention_mask, position_ids)

    outputs = model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **kwargs
    )
    hidden_states = outputs.hidden_states
    if hidden_states is not None:  # None for layers that were not asked for
        hidden_states = tuple(None if states is None else states.gather(1, by_token) for states in hidden_states)
    return VoCoLlamaModelOutputWithPast(
        last_hidden_state=outputs.last_hidden_state.gather(1, by_token),
        hidden_states=hidden_states,
        attentions=outputs.attentions,
        image_hidden_states=vision,
    )


def _mask_and_positions(
    model: "VoCoLlamaModel",
    embeds: torch.Tensor,
    layout: ExpandedLayout,
    runs: VoCoRuns,
    mode: str,
    text_groups: torch.Tensor | None,
    short_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
):
    batch_size, short_length = short_mask.shape
    mask = layout.attention_mask(short_mask, runs)
    columns = torch.arange(short_length, device=embeds.device)[None]
    if position_ids is None:
        position_ids = columns if text_groups is None else group_positions(text_groups)
    rules = []
    if text_groups is not None:
        groups = torch.zeros_like(mask, dtype=torch.long).scatter(1, layout.short, text_groups)
        rules.append(text_group_function(groups))
    if mode == "voco":
        positions = layout.compact_positions(position_ids.expand(batch_size, -1), runs)
        rules.append(voco_mask_function(*layout.segments(runs, batch_size)))
    else:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if text_groups is not None:
            positions = positions.scatter_add(1, layout.short, position_ids - columns)
    if not rules:
        return mask, positions
    return create_ruled_mask(model.config.text_config, embeds, mask, positions, and_masks(*rules)), positions


__all__ = ["run_single_pass"]
