"""Keys and values between transformers' cache and the graphs."""

from typing import Any

import torch
from transformers import Cache, DynamicCache

from .prefill import KeyValues
from .signature import Signature


def read_cache(
    cache: Cache, signature: Signature, batch_size: int, dtype: torch.dtype, device: torch.device
) -> KeyValues:
    """
    Raises:
        ValueError: if the cache is not a dynamic one, or has another number of layers.
    """
    if cache.get_seq_length() == 0:
        empty = torch.empty(batch_size, signature.heads, 0, signature.head_dim, dtype=dtype, device=device)
        return [(empty, empty)] * signature.layers
    if type(cache) is not DynamicCache or len(cache.layers) != signature.layers:
        raise ValueError(
            f"past_key_values must be a DynamicCache of {signature.layers} layers, got a {type(cache).__name__} of "
            f"{len(cache.layers)}"
        )
    cached: Any = cache.layers  # of keys and values; other kinds of model have others
    return [(layer.keys, layer.values) for layer in cached]


def write_cache(cache: Cache, present: KeyValues) -> None:
    """Makes `present` the content of a cache, without a copy where it has layers already."""
    layers: Any = cache.layers  # of keys and values
    for number, (keys, values) in enumerate(present):
        if number == len(layers) or not layers[number].is_initialized:
            cache.update(keys, values, number)
        else:
            layers[number].keys, layers[number].values = keys, values
