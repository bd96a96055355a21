"""
The second way to compute: images are compressed first, each on its own under plain causal attention; then the short
sequence runs with the keys and values of their VoCo tokens in its cache. For inference, and training where it fits.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from transformers import Cache, DynamicCache

from .attention_voco_llama import Mask, create_ruled_mask, group_positions, text_group_function
from .batches_voco_llama import compress_in_batches
from .compat_voco_llama import CACHE
from .injection_voco_llama import CompressedImages, CompressionCache, InjectionCache, views_by_layer
from .outputs_voco_llama import VoCoLlamaModelOutputWithPast
from .runtime_voco_llama import hooked_device, is_compiled, layers_alike, without_checkpointing


if TYPE_CHECKING:
    from .compression_voco_llama import VoCoLlamaCompressionMixin

# Behind columns that are left out attention needs a mask, which costs about as much as an eighth more columns
MIN_FRONT_SHARE = 1 / 8


def compress_segments(
    model: "VoCoLlamaCompressionMixin", vision: torch.Tensor, num_voco_tokens: int
) -> tuple[CompressionCache, torch.Tensor]:
    """
    One causal pass over a batch of segments.

    Args:
        vision (`torch.Tensor` of shape `(num_images, V, hidden_size)`): Vision tokens of the images.

    Returns:
        [`CompressionCache`] with the keys, at positions 0..k-1, and values of the VoCo tokens, and their last hidden
        states `(num_images, num_voco_tokens, hidden_size)`.
    """
    config = model.config
    prefix, suffix, voco = (
        model.embed_ids(ids).expand(vision.shape[0], -1, -1)
        for ids in (config.vision_prefix_token_ids, config.vision_suffix_token_ids, [config.voco_token_id])
    )
    segments = torch.cat([prefix, vision.to(prefix), suffix, voco.expand(-1, num_voco_tokens, -1)], dim=1)
    positions = torch.arange(num_voco_tokens - segments.shape[1], num_voco_tokens, device=segments.device)
    by_layer = is_compiled(model.language_model.layers[0])
    kept = CompressionCache(config.text_config.num_hidden_layers, num_voco_tokens, by_layer)
    with without_checkpointing(model.language_model), layers_alike(by_layer):
        hidden_states = model.language_model(
            inputs_embeds=segments, position_ids=positions[None], use_cache=True, **{CACHE: kept}
        ).last_hidden_state[:, -num_voco_tokens:]
    return kept, hidden_states


def compress_images(
    model: "VoCoLlamaCompressionMixin",
    pixel_values: torch.Tensor,
    counts: list[int],
    batch_size: int,
    show_progress: bool = False,
    image_sizes: torch.Tensor | None = None,
    **vision_options,
) -> list[torch.Tensor]:
    """
    First stage: keys at positions 0..k-1, values (both `(tokens, layers, key_value_heads, head_dim)`) and last hidden
    states `(tokens, hidden_size)` of the VoCo tokens of all images.
    """
    read, compress = partial(model.get_vision_features, **vision_options), partial(_compress_alike, model)
    return compress_in_batches(read, compress, pixel_values, image_sizes, counts, batch_size, show_progress)


def _compress_alike(model: "VoCoLlamaCompressionMixin", vision: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    # Images with fewer VoCo tokens are padded on the right, which causal attention never looks at
    length = max(counts)
    kept, hidden_states = compress_segments(model, vision, length)
    keys, values = (
        torch.stack([layer.transpose(1, 2).to(hidden_states.device) for layer in layers], dim=2)
        for layers in (kept.keys, kept.values)
    )
    by_token = [states.flatten(0, 1) for states in (keys, values, hidden_states)]
    if len(set(counts)) == 1:
        return by_token
    wanted = [length * image + offset for image, count in enumerate(counts) for offset in range(count)]
    return [states[torch.tensor(wanted, device=states.device)] for states in by_token]


def run_second_stage(
    model: "VoCoLlamaCompressionMixin",
    inputs_embeds: torch.Tensor,
    images: CompressedImages,
    cache: Cache | None,
    use_cache: bool,
    text_groups: torch.Tensor | None,
    attention_mask: Mask | dict[str, Mask],
    position_ids: torch.Tensor | None,
    **kwargs,
) -> VoCoLlamaModelOutputWithPast:
    """
    The short sequence under plain causal attention, with the compressed images in place. Columns in front of all text
    are left out where they are many: nothing but their keys and values is ever read.

    Args:
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            The columns that are run.
        images ([`CompressedImages`]):
            The images among them, their columns counted from the first of these.
        cache ([`~transformers.Cache`], *optional*):
            What earlier calls have left, and what this one fills.
        use_cache (`bool`):
            Whether to return the cache.
        text_groups, attention_mask, position_ids:
            See [`VoCoLlamaModel.forward`].
        kwargs:
            Further arguments of the text model.
    """
    cache = DynamicCache(config=model.config.text_config) if cache is None else cache
    (batch_size, length), device = inputs_embeds.shape[:2], inputs_embeds.device
    mask = attention_mask
    if text_groups is not None:
        position_ids = group_positions(text_groups) if position_ids is None else position_ids
        rule = text_group_function(text_groups)
        mask = create_ruled_mask(model.config.text_config, inputs_embeds, attention_mask, position_ids, rule)  # type: ignore[arg-type]
    elif position_ids is None:
        position_ids = torch.arange(length, device=device)[None] + cache.get_seq_length()
    rows, columns = (torch.from_numpy(places).to(device) for places in (images.rows, images.columns))
    moves = position_ids.expand(batch_size, -1)[rows, columns] - torch.from_numpy(images.offsets).to(device)
    states = model.rotate_keys(images.keys.to(device), moves), images.values.to(device)

    num_front = count_front_columns(images, length, attention_mask)
    num_left_out = 0 if _runs_all(model, num_front, length, mask, kwargs) else num_front
    in_front, among = split_tokens(images.columns < num_front, device)
    places = rows[in_front], columns[in_front], (batch_size, num_front)
    front = place_tokens(states[0][in_front], *places), place_tokens(states[1][in_front], *places)
    if num_left_out > 0:
        _fill(cache, front, model.language_model)
    by_layer = is_compiled(model.language_model.layers[0])
    injection = InjectionCache(
        cache,
        front if 0 < num_front != num_left_out else None,
        (states[0][among], states[1][among]),
        rows[among],
        columns[among] - num_left_out,
        by_layer,
    )
    with layers_alike(by_layer):
        outputs = model.language_model(
            inputs_embeds=inputs_embeds[:, num_left_out:],
            attention_mask=mask,
            position_ids=position_ids[:, num_left_out:],
            use_cache=True,
            **{CACHE: injection},
            **kwargs,
        )
    hidden_states, all_hidden_states = _with_voco_states(outputs, images, rows, columns, num_left_out)
    named_cache: dict[str, Any] = {CACHE: cache if use_cache else None}
    return VoCoLlamaModelOutputWithPast(
        last_hidden_state=hidden_states,
        hidden_states=all_hidden_states,
        attentions=outputs.attentions,
        **named_cache,
    )


def _fill(cache: Cache, front: tuple[torch.Tensor, ...], language_model: Any) -> None:
    """Puts the keys and values of columns that are not run into a cache, each layer's where it computes."""
    common = hooked_device(language_model, front[0].device)
    for index, (layer, keys, values) in enumerate(zip(language_model.layers, *map(views_by_layer, front))):
        device = hooked_device(layer, common)
        cache.update(keys.to(device), values.to(device), index)


def _with_voco_states(
    outputs, images: CompressedImages, rows: torch.Tensor, columns: torch.Tensor, num_left_out: int
) -> tuple[torch.Tensor, tuple | None]:
    """Last hidden states, those of VoCo tokens where they are known, and hidden states of all layers if asked for."""
    hidden_states, all_hidden_states = outputs.last_hidden_state, outputs.hidden_states
    if num_left_out > 0:
        hidden_states = torch.nn.functional.pad(hidden_states, (0, 0, num_left_out, 0))
    if images.hidden_states is not None:
        hidden_states = hidden_states.index_put((rows, columns), images.hidden_states.to(hidden_states))
        if all_hidden_states is not None and all_hidden_states[-1] is not None:
            all_hidden_states = (*all_hidden_states[:-1], hidden_states)
    return hidden_states, all_hidden_states


def _runs_all(
    model: "VoCoLlamaCompressionMixin",
    num_front: int,
    length: int,
    attention_mask: Mask | dict[str, Mask],
    arguments: dict[str, Any],
) -> bool:
    """Whether columns in front of all text are run, and their keys and values replaced."""
    config = model.config.text_config
    records_layers = arguments.get("output_attentions", config.output_attentions) or arguments.get(
        "output_hidden_states", config.output_hidden_states
    )
    is_plain = attention_mask is None or tells_padding(attention_mask)
    are_few = num_front < MIN_FRONT_SHARE * (length - num_front)
    return bool(records_layers) or not is_plain or are_few


def tells_padding(attention_mask: Mask | dict[str, Mask]) -> TypeGuard[torch.Tensor]:
    """Whether a mask is one of tokens, and not a finished one of who attends to whom."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


@torch.compiler.disable
def count_front_columns(images: CompressedImages, length: int, attention_mask: Mask | dict[str, Mask]) -> int:
    """
    Columns that hold nothing but images, or padding, in every row, in front of all others. Padding is known if
    [`tells_padding`].
    """
    is_text = np.ones((images.batch_size, length), dtype=bool)
    is_text[images.rows, images.columns] = False
    if tells_padding(attention_mask):
        is_text &= attention_mask[:, -length:].bool().cpu().numpy()
    has_text = is_text.any(axis=0)
    # At least one column is run, for the last hidden states
    has_text[-1] = True  # type: ignore[index]
    return int(has_text.argmax())


@torch.compiler.disable
def split_tokens(
    is_front: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | tuple[slice, slice]:
    """Indices of tokens in front and of the others; where there are no others, slices, which copy nothing."""
    num_front = int(is_front.sum())
    if num_front in (0, len(is_front)):
        return slice(num_front), slice(num_front, None)
    front, others = (torch.from_numpy(chosen.nonzero()[0]).to(device) for chosen in (is_front, ~is_front))
    return front, others


def place_tokens(
    states: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """`(batch_size, num_columns, ...)`: states of tokens at their places, zeros elsewhere; a view if nothing is."""
    if len(states) == shape[0] * shape[1]:
        return states.unflatten(0, shape)
    return states.new_zeros(*shape, *states.shape[1:]).index_put((rows, columns), states)


__all__ = ["compress_images", "compress_segments", "run_second_stage"]
