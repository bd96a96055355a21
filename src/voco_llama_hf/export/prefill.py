"""
A prompt with images for a decoder that is plain causal.

Text must not see an image that comes later, and an image is not computed but put in as keys and values. So a prompt is
run in stages: the images that stand before a run of text are appended to the past, then the text goes through the
decoder. Images first is one stage, whatever the padding. Between stages the rows of a batch are packed: the past ends,
and new text begins, at the same column in every row.
"""

from collections.abc import Callable

import torch


KeyValues = list[tuple[torch.Tensor, torch.Tensor]]


def number_stages(voco_mask: torch.Tensor, text_mask: torch.Tensor) -> torch.Tensor:
    """
    Stage of every token: a new one begins where an image follows text of its row.

    Args:
        voco_mask, text_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            What is a token of an image and what is text; the rest is padding.

    Returns:
        `torch.LongTensor` of shape `(batch_size, sequence_length)`.
    """
    text_before = text_mask.long().cumsum(1)
    at_last_image = torch.where(voco_mask, text_before, 0).cummax(1).values
    before = torch.nn.functional.pad(at_last_image, (1, 0))[:, :-1]
    return (voco_mask & (text_before > before)).long().cumsum(1)


def packed_mask(counts: torch.Tensor, side: str) -> torch.Tensor:
    """`(batch_size, counts.max())` mask of rows of so many tokens, with padding on one `side`."""
    width = int(counts.max())
    columns = torch.arange(width, device=counts.device)
    return columns >= width - counts[:, None] if side == "left" else columns < counts[:, None]


def pack(values: torch.Tensor, mask: torch.Tensor, side: str) -> torch.Tensor:
    """The `values` at `mask` `(batch_size, length)`, row by row next to each other; zeros where there are fewer."""
    places = packed_mask(mask.sum(1), side)
    packed = values.new_zeros(*places.shape, *values.shape[2:])
    packed[places] = values[mask]
    return packed


def move_columns(states: KeyValues, source: torch.Tensor, target: torch.Tensor) -> KeyValues:
    """
    Keys and values moved along the sequence.

    Args:
        source, target (`torch.BoolTensor` of shape `(batch_size, length)`):
            Where the tokens of each row are, and where they shall be: as many, in the same order.
    """
    if source.shape == target.shape and torch.equal(source, target):
        return states
    index = torch.zeros_like(target, dtype=torch.long)
    index[target] = source.nonzero()[:, 1]

    def move(tensor: torch.Tensor) -> torch.Tensor:
        by_column = index.to(tensor.device)[:, None, :, None]
        return tensor.gather(2, by_column.expand(-1, tensor.shape[1], -1, tensor.shape[3]))

    return [(move(keys), move(values)) for keys, values in states]


def prefill(
    decode: Callable[..., tuple[torch.Tensor, KeyValues]],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past: KeyValues,
    voco_mask: torch.Tensor,
    images: torch.Tensor,
) -> tuple[torch.Tensor | None, KeyValues]:
    """
    Args:
        decode (`Callable`):
            The decoder: `input_ids`, `attention_mask` of past and input, `position_ids`, past to logits and present.
        attention_mask (`torch.LongTensor` of shape `(batch_size, past_length + sequence_length)`):
            0 at padding.
        voco_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            The `<voco>` tokens of `input_ids`.
        images (`torch.Tensor` of shape `(2, layers, tokens, key_value_heads, head_dim)`):
            Keys, at their positions, and values of those tokens, row by row.

    Returns:
        `tuple[torch.Tensor | None, KeyValues]`: logits `(batch_size, sequence_length, vocab_size)`, zeros where an
        image or padding is and None without any text, and the present keys and values, column by column as in
        `attention_mask`.
    """
    length = input_ids.shape[1]
    everything = attention_mask.bool()
    real = everything[:, everything.shape[1] - length :]
    voco_mask, text_mask = voco_mask & real, real & ~voco_mask
    stages = number_stages(voco_mask, text_mask)
    filled = everything[:, : everything.shape[1] - length]
    logits = None
    for stage in range(int(stages.max()) + 1):
        here = voco_mask & (stages == stage)
        if here.any():
            past, filled = append(past, filled, images[:, :, (stages[voco_mask] == stage).to(images.device)], here)
        here = text_mask & (stages == stage)
        if here.any():
            packed = packed_mask(filled.sum(1), "left")
            past = move_columns(past, filled, packed)
            filled = torch.cat([packed, packed_mask(here.sum(1), "right")], dim=1)
            new_logits, past = decode(
                pack(input_ids, here, "right"), filled.long(), pack(position_ids, here, "right"), past
            )
            if logits is None:
                logits = new_logits.new_zeros(*input_ids.shape, new_logits.shape[-1])
            logits[here.to(logits.device)] = new_logits[packed_mask(here.sum(1), "right").to(logits.device)]
    return logits, move_columns(past, filled, everything)


def append(
    past: KeyValues, filled: torch.Tensor, images: torch.Tensor, mask: torch.Tensor
) -> tuple[KeyValues, torch.Tensor]:
    """Puts images behind the past of the rows that have some in `mask`, and says what is filled then."""
    places = packed_mask(mask.sum(1), "left")
    on_device = places.to(images.device)
    _, layers, _, heads, head_dim = images.shape
    block = images.new_zeros(2, layers, *places.shape, heads, head_dim)
    block[:, :, on_device] = images
    block = block.transpose(3, 4)
    joined = [
        (torch.cat([keys, block[0, layer]], dim=2), torch.cat([values, block[1, layer]], dim=2))
        for layer, (keys, values) in enumerate(past)
    ]
    return joined, torch.cat([filled, places], dim=1)
