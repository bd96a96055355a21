"""
Keys and values of compressed images on their way into vLLM's paged cache, and of images that are being compressed on
their way out. Each layer's rotary embedding and attention are wrapped; which of both happens, all layers share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Recorder:
    """
    What a pass over images that are compressed leaves behind.

    Args:
        num_images (`int`): Segments of the pass, all of the same length.
        num_kept (`int`): Tokens at the end of each segment that are recorded.
    """

    num_images: int
    num_kept: int
    states: list[torch.Tensor] = field(default_factory=list)

    def record(self, states: torch.Tensor) -> None:
        """Keys before their rotation, or values, or hidden states, in the order in which layers compute them."""
        self.states.append(states.view(self.num_images, -1, states.shape[-1])[:, -self.num_kept :])

    def rows(self) -> torch.Tensor:
        """`(num_images, num_kept, width)`"""
        return torch.cat(self.states, dim=-1)


class Rows(nn.Module):
    """
    What is known of the VoCo tokens of a step. Buffers of fixed address, read at every token of every step: a branch
    for steps without images would be compiled away on one of both paths.

    Args:
        num_rows (`int`): VoCo tokens that a step can have.
        num_tokens (`int`): Tokens that a step can have.
        width (`int`): Numbers of a token's keys, or values, of one layer.
        num_layers (`int`): Layers.
        hidden_size (`int`): Numbers of a hidden state.
    """

    places: torch.Tensor
    states: torch.Tensor

    def __init__(self, num_rows: int, num_tokens: int, width: int, num_layers: int, hidden_size: int):
        super().__init__()
        self.width, self.hidden_start = width, 2 * num_layers * width
        self.recorder: Recorder | None = None
        self._has_images = False
        # Place 0 stands for tokens that are not of an image
        self.register_buffer("states", torch.zeros(num_rows + 1, self.hidden_start + hidden_size), persistent=False)
        self.register_buffer("places", torch.zeros(num_tokens, dtype=torch.long), persistent=False)

    def put(self, states: torch.Tensor, start: int) -> torch.Tensor:
        """`states` of the tokens of a step, with those of images, which begin at column `start`, in their places."""
        places = self.places[: states.shape[0]]
        own = self.states[:, start : start + states.shape[1]][places]
        return torch.where((places > 0)[:, None], own, states)

    def place(self, embeddings: Sequence[torch.Tensor], is_image: torch.Tensor | None) -> None:
        """
        Fills the buffers for a step.

        Args:
            embeddings (`Sequence[torch.Tensor]`):
                Parts of compressed images, each of shape `(tokens, width)`, in the order of their tokens.
            is_image (`torch.Tensor` of shape `(num_tokens,)`):
                True at these tokens.
        """
        if not embeddings or is_image is None:
            if self._has_images:
                self.places.zero_()
                self._has_images = False
            return
        places = torch.zeros(len(self.places), dtype=torch.long)
        places[: len(is_image)][is_image.cpu()] = torch.tensor(self._store(embeddings))
        self.places.copy_(places)
        self._has_images = True

    def _store(self, embeddings: Sequence[torch.Tensor]) -> list[int]:
        """The place of every token. One that stands in many requests of a step has one place."""
        known: dict[int, int] = {}
        found: list[int] = []
        for part in embeddings:
            row_bytes = part.stride(0) * part.element_size()
            addresses = [part.data_ptr() + row * row_bytes for row in range(len(part))]
            new = [row for row, address in enumerate(addresses) if address not in known]
            first = len(known) + 1
            known |= {addresses[row]: first + offset for offset, row in enumerate(new)}
            if new:
                self.states[first : first + len(new)] = part if len(new) == len(part) else part[new]
            found += [known[address] for address in addresses]
        return found


class InjectedRotary(nn.Module):
    """The rotary embedding of one layer, before which keys are recorded or put in."""

    def __init__(self, rotary_emb: nn.Module, rows: Rows, layer: int):
        super().__init__()
        self.rotary_emb, self.rows = rotary_emb, rows
        self.start = 2 * layer * rows.width

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Any:
        if self.rows.recorder is not None:
            # vLLM rotates in place
            self.rows.recorder.record(key.clone())
        else:
            key = self.rows.put(key, self.start)
        return self.rotary_emb(positions, query, key)


class InjectedAttention(nn.Module):
    """The attention of one layer, before which values are put in; while images are compressed, one without a cache."""

    def __init__(self, attn: Any, rows: Rows, layer: int):  # vLLM's Attention
        super().__init__()
        self.attn, self.rows = attn, rows
        self.start = (2 * layer + 1) * rows.width

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self.rows.recorder is None:
            return self.attn(query, key, self.rows.put(value, self.start))
        self.rows.recorder.record(value)
        return attend(self.attn, query, key, value, self.rows.recorder.num_images)


def attend(attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_images: int) -> torch.Tensor:
    """Causal attention inside each of `num_images` sequences, with the heads, scale and window of vLLM's `attn`."""
    own_query, own_key, own_value = (
        states.view(num_images, -1, heads, attn.head_size).transpose(1, 2)
        for states, heads in ((query, attn.num_heads), (key, attn.num_kv_heads), (value, attn.num_kv_heads))
    )
    length, mask = own_query.shape[2], None
    if attn.sliding_window is not None and attn.sliding_window < length:
        distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
        mask = (distance >= 0) & (distance < attn.sliding_window)
    attended = nn.functional.scaled_dot_product_attention(
        own_query,
        own_key,
        own_value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=attn.impl.scale,
        enable_gqa=True,
    )
    return attended.transpose(1, 2).reshape(query.shape)


def inject(layers: Sequence[Any], rows: Rows) -> None:  # layers of whatever model vLLM has
    """Wraps the rotary embedding and the attention of each layer."""
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        attention.rotary_emb = InjectedRotary(attention.rotary_emb, rows, index)
        attention.attn = InjectedAttention(attention.attn, rows, index)
