"""Who attends to whom: the VoCo attention rule, and the masks that realise it.

A user's sequence is short: an image costs its k `<voco>` tokens. Inside the model every image is a *segment*,

    vision prefix | V vision tokens | vision suffix | k VoCo tokens

and the rule (paper, Eq. 3, with segments independent of each other) is

    a token of a segment attends causally inside its own segment and to nothing else;
    text attends causally to text and to VoCo tokens, never to prefix, vision or suffix tokens.
"""

from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig
from transformers.masking_utils import and_masks, create_causal_mask

from .configuration_voco_llama import layer_types, sliding_window


# None where an attention needs no mask
Mask = torch.Tensor | BlockMask | None
MASKABLE_ATTENTION = ("eager", "sdpa", "flex_attention")


def takes_masks(text_config: PreTrainedConfig) -> bool:
    """Whether the attention of a text model can apply the rule."""
    return text_config._attn_implementation in MASKABLE_ATTENTION


def create_ruled_mask(
    text_config: PreTrainedConfig,
    embeds: torch.Tensor,
    padding_mask: torch.Tensor | None,
    positions: torch.Tensor,
    rule: Callable,
) -> Mask | dict[str, Mask]:
    """
    A finished mask of a whole sequence, in the form that the text model's attention takes: 4D, or a `BlockMask` for
    flex_attention; one for each kind of layers where some have a window.

    Args:
        text_config ([`~transformers.PreTrainedConfig`]):
            Configuration of the text model.
        embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Embeddings of the sequence.
        padding_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            0 at padding.
        positions (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Positions of the tokens, over which windows are measured.
        rule (`Callable`):
            A mask function, on top of causality and padding.
    """
    full = create_causal_mask(text_config, embeds, padding_mask, None, and_mask_function=rule)
    window = sliding_window(text_config)
    if window is None:
        return full
    rule = and_masks(rule, position_window_function(positions, window))
    sliding = create_causal_mask(text_config, embeds, padding_mask, None, and_mask_function=rule)
    is_mixed = "full_attention" in layer_types(text_config)
    return {"full_attention": full, "sliding_attention": sliding} if is_mixed else sliding


def voco_mask_function(segment_ids: torch.Tensor, readable: torch.Tensor) -> Callable:
    """
    The attention rule as a mask function for [`~transformers.masking_utils.create_causal_mask`], which adds causality
    and padding.

    Args:
        segment_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            0 for text; the tokens of one segment share a number above 0.
        readable (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            True for what text may attend to: text and VoCo tokens.
    """

    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.Tensor:
        q_segment = segment_ids[batch_idx, q_idx]
        own = q_segment == segment_ids[batch_idx, kv_idx]
        return own | ((q_segment == 0) & readable[batch_idx, kv_idx])

    return inner_mask


def text_group_function(text_groups: torch.Tensor) -> Callable:
    """
    A mask function under which tokens see group 0 and their own group.

    Args:
        text_groups (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Group of every token.
    """

    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.Tensor:
        kv_group = text_groups[batch_idx, kv_idx]
        return (kv_group == 0) | (kv_group == text_groups[batch_idx, q_idx])

    return inner_mask


def group_positions(text_groups: torch.Tensor) -> torch.Tensor:
    """Positions under which every group stands right behind the tokens of group 0 before it, of the same shape."""
    columns = torch.arange(text_groups.shape[1], device=text_groups.device).expand_as(text_groups)
    is_common = text_groups == 0
    num_common = is_common.long().cumsum(-1)
    begins = torch.ones_like(is_common)
    begins[:, 1:] = text_groups[:, 1:] != text_groups[:, :-1]
    begin = columns.masked_fill(~begins, 0).cummax(-1).values
    return torch.where(is_common, num_common - 1, num_common + columns - begin)


def position_window_function(position_ids: torch.Tensor, sliding_window: int) -> Callable:
    """A sliding window over compact positions, in which a hidden image takes no room."""

    def inner_mask(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> torch.Tensor:
        return position_ids[batch_idx, q_idx] - position_ids[batch_idx, kv_idx] < sliding_window

    return inner_mask


__all__ = ["create_ruled_mask", "takes_masks", "voco_mask_function"]
