"""
Keys and values on their way out of one pass and into another: recorded when an image is compressed, put among those of
text when it is asked about. Both are caches whose `update` every attention layer calls.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import Cache


@dataclass
class CompressedImages:
    """
    The VoCo tokens of compressed images and where they stand in a batch of sequences: by row and by column of the
    whole sequence, from its first token on. A forward pass that runs some columns takes what stands in them, so that
    the same argument serves a prefill in one piece or in chunks, later turns, beams and proposals of an assistant.

    Args:
        keys, values (`torch.Tensor` of shape `(tokens, layers, key_value_heads, head_dim)`):
            Keys and values of the VoCo tokens, the keys at the positions `offsets`.
        hidden_states (`torch.Tensor` of shape `(tokens, hidden_size)`, *optional*):
            Last hidden states of the VoCo tokens, unknown to a [`VoCoCache`].
        offsets (`np.ndarray` of shape `(tokens,)`):
            Place 0..k-1 of each token in its image.
        rows, columns (`np.ndarray` of shape `(tokens,)`):
            Where each token stands.
        batch_size (`int`):
            Rows of the batch.
    """

    keys: torch.Tensor
    values: torch.Tensor
    hidden_states: torch.Tensor | None
    offsets: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    batch_size: int

    @classmethod
    def place(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        hidden_states: torch.Tensor | None,
        counts: list[int],
        voco_mask: np.ndarray,
        start: int,
    ) -> "CompressedImages":
        """
        Images of `counts` VoCo tokens, where `voco_mask` of shape `(batch_size, num_columns)` has their tokens; it
        begins at the column `start` of the whole sequence.
        """
        offsets = np.concatenate([np.arange(count) for count in counts])
        rows, columns = voco_mask.nonzero()
        return cls(keys, values, hidden_states, offsets, rows, columns + start, len(voco_mask))

    @torch.compiler.disable
    def stand_in(self, start: int, length: int) -> bool:
        """Whether any token stands in `length` columns from `start` on."""
        return bool(((self.columns >= start) & (self.columns < start + length)).any())

    @torch.compiler.disable
    def window(self, start: int, length: int, batch_size: int) -> "CompressedImages":
        """
        The tokens that stand in `length` columns from `start` on, their columns counted from there, for a batch in
        which every row may be repeated (beams, several sequences a prompt).

        Raises:
            ValueError: if `batch_size` is no multiple of the rows.
        """
        if batch_size % self.batch_size:
            raise ValueError(f"images of {self.batch_size} rows cannot be put into a batch of {batch_size}")
        (tokens,) = ((self.columns >= start) & (self.columns < start + length)).nonzero()
        columns = self.columns - start
        if batch_size == self.batch_size and len(tokens) == len(columns):
            return replace(self, columns=columns)
        times = batch_size // self.batch_size
        rows = self.rows[tokens][:, None] * times + np.arange(times)
        # Row by row, as tokens stand in a batch
        order = np.lexsort((columns[tokens].repeat(times), rows.ravel()))
        tokens = tokens.repeat(times)[order]
        index = torch.from_numpy(tokens)
        keys, values = (states[index.to(states.device)] for states in (self.keys, self.values))
        hidden_states = None if self.hidden_states is None else self.hidden_states[index.to(self.hidden_states.device)]
        return CompressedImages(
            keys, values, hidden_states, self.offsets[tokens], rows.ravel()[order], columns[tokens], batch_size
        )


class CompressionCache(Cache):
    """
    Keeps the keys and values of the last `num_kept` tokens of one pass, and nothing of the image.

    Args:
        num_layers (`int`):
            Layers of the text model.
        num_kept (`int`):
            Tokens whose keys and values are kept.
        by_layer (`bool`, *optional*, defaults to `False`):
            Whether layers are compiled one by one. Each would be compiled again for its number, so that they are
            counted instead, outside of what is compiled.
    """

    def __init__(self, num_layers: int, num_kept: int, by_layer: bool = False):
        super().__init__(layers=[])
        self.num_kept = num_kept
        self.by_layer = by_layer
        self.num_layers_run = 0
        # Places made at once: a list that grows would have compiled layers compiled again for each
        self.keys: list[torch.Tensor] = [torch.empty(0)] * num_layers
        self.values: list[torch.Tensor] = [torch.empty(0)] * num_layers

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        keys, values = (states[:, :, -self.num_kept :].clone() for states in (key_states, value_states))
        if self.by_layer:
            self._keep_next(keys, values)
        else:
            self.keys[layer_idx], self.values[layer_idx] = keys, values
        return key_states, value_states

    @torch.compiler.disable
    def _keep_next(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[self.num_layers_run], self.values[self.num_layers_run] = keys, values
        self.num_layers_run += 1


class InjectionCache(Cache):
    """
    Puts the keys and values of compressed images among those of text, on their way into another cache, of whatever
    kind: dynamic, static, quantized, offloaded. It is updated once, by one pass.

    Args:
        cache ([`~transformers.Cache`]):
            The cache that is filled.
        front (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Keys and values `(batch_size, num_columns, layers, key_value_heads, head_dim)` that replace those of the
            first columns of the pass.
        among (`tuple[torch.Tensor, torch.Tensor]`):
            Keys and values `(num_tokens, layers, key_value_heads, head_dim)` that replace those of single tokens.
        rows, columns (`torch.LongTensor` of shape `(num_tokens,)`):
            Where these tokens stand in the pass.
        by_layer (`bool`, *optional*, defaults to `False`):
            See [`CompressionCache`].
    """

    def __init__(
        self,
        cache: Cache,
        front: tuple[torch.Tensor, torch.Tensor] | None,
        among: tuple[torch.Tensor, torch.Tensor],
        rows: torch.Tensor,
        columns: torch.Tensor,
        by_layer: bool = False,
    ):
        super().__init__(layers=cache.layers)
        self.by_layer, self.num_layers_run = by_layer, 0
        self.cache = cache
        self.num_front = 0 if front is None else front[0].shape[1]
        # Views by layer are made at once: in a short pass every call from Python counts
        self.front = [] if front is None else [views_by_layer(states) for states in front]
        self.among = [states.unbind(1) for states in among]
        self.rows, self.columns = rows, columns

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        if self.by_layer:
            return self._update_next(key_states, value_states)
        return self._update(key_states, value_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _update_next(self, key_states: torch.Tensor, value_states: torch.Tensor):
        self.num_layers_run += 1
        return self._update(key_states, value_states, self.num_layers_run - 1)

    def _update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        states = [key_states, value_states]
        if self.num_front > 0:
            states = [
                torch.cat([kind[layer_idx].to(own), own[:, :, self.num_front :]], dim=2)
                for kind, own in zip(self.front, states)
            ]
        if len(self.rows) > 0:
            places = self.rows.to(key_states.device), self.columns.to(key_states.device)
            states = [
                own.transpose(1, 2).index_put(places, kind[layer_idx].to(own)).transpose(1, 2)
                for kind, own in zip(self.among, states)
            ]
        return self.cache.update(states[0], states[1], layer_idx, *args, **kwargs)


def views_by_layer(states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Keys or values `(batch_size, num_columns, layers, key_value_heads, head_dim)` as one view a layer, as caches have
    them: `(batch_size, key_value_heads, num_columns, head_dim)`.
    """
    return states.permute(2, 0, 3, 1, 4).unbind()


__all__ = ["CompressedImages", "CompressionCache", "InjectionCache", "views_by_layer"]
