"""How many vision tokens an image has, counted without a model."""

from types import SimpleNamespace
from typing import Any

import torch

from .modeling.configuration_voco_llama import VoCoLlamaConfig
from .modeling.modeling_voco_llama import MODELS
from .modeling.tiles_voco_llama import count_tiles


def count_vision_tokens(config: VoCoLlamaConfig, image_size: tuple[int, int] | None = None) -> int:
    """
    Vision tokens of an image, which its VoCo tokens stand for.

    Args:
        config ([`VoCoLlamaConfig`]):
            Configuration of the model.
        image_size (`tuple[int, int]`, *optional*):
            Height and width of the image, where they decide on it. By default [`largest_size`].
    """
    if config.base_model_type == "llava":
        return count_tile_tokens(config)
    return _count_packed_tokens(config, largest_size(config) if image_size is None else image_size)


def largest_size(config: VoCoLlamaConfig) -> tuple[int, int]:
    """
    Height and width that have the most vision tokens of those that a model divides images into. LLaVA-OneVision, which
    scales down what has too many, leaves a few shapes between them up to 8 % more.
    """
    vision: Any = config.vision_config
    if config.base_model_type == "llava":
        return vision.image_size, vision.image_size
    grid: Any = config.image_grid_pinpoints
    return max(((height, width) for height, width in grid), key=lambda size: _count_packed_tokens(config, size))


def count_largest_tiles(config: VoCoLlamaConfig) -> int:
    """Tiles of that image; one where images are not divided."""
    return count_image_tiles(config, largest_size(config))


def count_image_tiles(config: VoCoLlamaConfig, image_size: tuple[int, int]) -> int:
    """Tiles of an image of this height and width, with the one that shows all of it."""
    vision: Any = config.vision_config
    grid: Any = config.image_grid_pinpoints
    return 1 if grid is None else count_tiles(image_size, grid, vision.image_size)


def count_tile_tokens(config: VoCoLlamaConfig) -> int:
    """Vision tokens of one tile, or of an image that is not divided, without a newline."""
    vision: Any = config.vision_config  # of whatever class the vision tower has
    patches = (vision.image_size // vision.patch_size) ** 2
    has_class_token = vision.model_type == "clip_vision_model" and config.vision_feature_select_strategy == "full"
    return patches + has_class_token


def _count_packed_tokens(config: VoCoLlamaConfig, size: tuple[int, int]) -> int:
    # The class of transformers packs shapes alone, and asks nothing of a model but its configuration
    side: Any = MODELS[config.base_model_type]
    owner = SimpleNamespace(config=config)
    grid: Any = config.image_grid_pinpoints
    vision: Any = config.vision_config
    tiles = torch.empty(count_tiles(size, grid, vision.image_size), count_tile_tokens(config), 1, device="meta")
    newline = torch.empty(1, device="meta")
    packed, _ = side.pack_image_features(owner, [tiles], [size], image_newline=newline, **side.pack_options(config))
    return len(packed[0])


__all__ = ["count_image_tiles", "count_largest_tiles", "count_tile_tokens", "count_vision_tokens", "largest_size"]
