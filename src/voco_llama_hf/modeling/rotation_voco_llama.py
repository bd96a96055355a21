"""Keys of compressed images moved to other positions: RoPE is a rotation, so one more rotation moves a key."""

import sys
from typing import TYPE_CHECKING

import torch

from .compat_voco_llama import CACHE
from .injection_voco_llama import CompressionCache
from .runtime_voco_llama import execution_device


if TYPE_CHECKING:
    from .compression_voco_llama import VoCoLlamaCompressionMixin


ROTATION_BLOCK_SIZE = 256  # tokens whose keys are rotated at a time, in float32


def rotate_keys(keys: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> torch.Tensor:
    """
    Moves keys by `positions`. Exact for every static RoPE.

    Args:
        keys (`torch.Tensor` of shape `(tokens, ..., head_dim)`):
            Keys after their own rotation.
        positions (`torch.LongTensor` of shape `(tokens,)`):
            How far to move each token, may be negative.
        rotary_emb (`torch.nn.Module`):
            The rotary embedding of the text model.

    Returns:
        `torch.Tensor` of the shape and dtype of `keys`; it is computed in float32.
    """
    positions = positions.to(keys.device)
    blocks = [
        _rotate_block(block, place, rotary_emb)
        for block, place in zip(keys.split(ROTATION_BLOCK_SIZE), positions.split(ROTATION_BLOCK_SIZE))
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _rotate_block(keys: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> torch.Tensor:
    # Each model pairs the numbers of a key in its own way, known to the function beside its rotary embedding
    rotation = sys.modules[type(rotary_emb).__module__].apply_rotary_pos_emb
    by_head = keys.float().flatten(1, -2).transpose(0, 1)[None]
    cos, sin = rotary_emb(by_head, positions[None])
    # Scaled RoPE (YaRN) scales cos and sin; the keys have that factor already
    if rotary_emb.attention_scaling != 1:
        cos, sin = cos / rotary_emb.attention_scaling, sin / rotary_emb.attention_scaling
    # Queries and keys are rotated alike, so that keys can take the place of both
    rotated = torch.cat(rotation(*by_head.tensor_split(2, dim=1), cos, sin), dim=1)
    return rotated[0].transpose(0, 1).reshape(keys.shape).to(keys.dtype)


@torch.no_grad()
def check_rotation(model: "VoCoLlamaCompressionMixin") -> None:
    """
    Moves a key and compares: a lone token reads nothing but itself, so its position shows in keys only.

    Raises:
        ValueError: if the text model rotates in another way, or some of its layers do not rotate at all.
    """
    config, device, distance = model.config.text_config, execution_device(model.language_model), 7
    token = torch.linspace(-1, 1, config.hidden_size, dtype=model.dtype, device=device).expand(2, 1, -1)
    kept = CompressionCache(config.num_hidden_layers, 1)
    positions = torch.tensor([[0], [distance]], device=device)
    # Not worth compiling layers for its odd shape
    with torch.compiler.set_stance("force_eager"):
        model.language_model(inputs_embeds=token, position_ids=positions, use_cache=True, **{CACHE: kept})
    for key in kept.keys:
        if key.numel() == 0 or not _is_moved(key[:1, :, 0].float(), key[1:, :, 0].float(), positions[1], model):
            raise ValueError(
                f"the keys of {config.model_type} cannot be moved to other positions: VoCo-LLaMA needs a text model "
                "that rotates whole keys in every layer"
            )


def _is_moved(
    here: torch.Tensor, there: torch.Tensor, distance: torch.Tensor, model: "VoCoLlamaCompressionMixin"
) -> bool:
    try:
        moved = model.rotate_keys(here, distance)
    except RuntimeError:  # a rotation of a part of each key has other shapes
        return False
    return bool((moved - there).norm() <= 0.05 * there.norm())


__all__ = ["check_rotation", "rotate_keys"]
