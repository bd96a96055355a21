"""Preprocessed images, between whoever prepares them and whoever compresses them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .vision_tokens import count_largest_tiles, largest_size


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from .modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor

PIXELS = ("pixel_values", "image_sizes")


def prepare(image_processor: "BaseImageProcessor", image: Any) -> dict[str, torch.Tensor]:
    """What [`VoCoLlamaForConditionalGeneration.compress`] takes, for an image or a list of them."""
    made = image_processor(image, return_tensors="pt")
    return {name: made[name] for name in PIXELS if name in made}


def name_number(num_voco_tokens: int, per_tile: bool) -> dict[str, int]:
    """What tells the processor and the model how many VoCo tokens an image gets, or else each of its tiles."""
    return {"num_voco_tokens_per_tile" if per_tile else "num_voco_tokens": num_voco_tokens}


def choose_number(
    processor: "VoCoLlamaProcessor", num_voco_tokens: int | None = None, num_voco_tokens_per_tile: int | None = None
) -> tuple[int, bool]:
    """
    How many VoCo tokens an image gets, or else each of its tiles, and which of both: as is asked, or by default as the
    model was trained for.
    """
    if num_voco_tokens is not None:
        return num_voco_tokens, False
    if num_voco_tokens_per_tile is None:
        num_voco_tokens_per_tile = processor.num_voco_tokens_per_tile
    if num_voco_tokens_per_tile is None:
        return processor.num_voco_tokens, False
    return num_voco_tokens_per_tile, True


def join(pictures: Sequence[dict[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """
    What [`prepare`] made of several images, as one batch: with zeros behind the tiles of those that have fewer.

    Args:
        pictures (`Sequence[dict[str, torch.Tensor]]`): Images.
        dtype (`torch.dtype`): Data type of the pixels.
    """
    pixels = [picture["pixel_values"] for picture in pictures]
    if "image_sizes" not in pictures[0]:
        return {"pixel_values": torch.cat(pixels).to(dtype)}
    most = max(tiles.shape[1] for tiles in pixels)
    padded = [torch.nn.functional.pad(tiles, (0, 0) * 3 + (0, most - tiles.shape[1])) for tiles in pixels]
    sizes = torch.cat([picture["image_sizes"] for picture in pictures])
    return {"pixel_values": torch.cat(padded).to(dtype), "image_sizes": sizes}


def choose(pictures: dict[str, torch.Tensor], images: list[int]) -> dict[str, torch.Tensor]:
    """Some images of a batch."""
    return {name: tensor[images] for name, tensor in pictures.items()}


def random_pictures(model: "VoCoLlamaForConditionalGeneration", num_images: int) -> dict[str, torch.Tensor]:
    """Random images of the size that has the most vision tokens."""
    config: Any = model.config
    side: int = config.vision_config.image_size
    like: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    if config.base_model_type == "llava":
        return {"pixel_values": torch.randn(num_images, 3, side, side, **like)}
    tiles = torch.randn(num_images, count_largest_tiles(config), 3, side, side, **like)
    return {"pixel_values": tiles, "image_sizes": torch.tensor([largest_size(config)] * num_images)}


__all__ = ["PIXELS", "choose", "choose_number", "join", "name_number", "prepare", "random_pictures"]
