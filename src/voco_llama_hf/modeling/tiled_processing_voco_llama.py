"""What a processor does with an image processor that divides images into tiles."""

from typing import Any

import torch
from transformers import BaseImageProcessor

from .tiles_voco_llama import FRAME, count_tiles, split_tiles


GRID = "image_grid_pinpoints"


def divides_images(image_processor: BaseImageProcessor) -> bool:
    """Whether an image processor divides images into tiles."""
    return GRID in image_processor.valid_kwargs.__annotations__


def check_divides_images(image_processor: BaseImageProcessor) -> None:
    """
    Raises:
        ValueError: if an image processor divides no images.
    """
    if not divides_images(image_processor):
        raise ValueError("num_voco_tokens_per_tile needs an image processor that divides images into tiles")


def process_tiles(
    image_processor: BaseImageProcessor, pictures: list[Any], are_frames: list[bool], apart: bool, **kwargs: Any
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """
    Pixels of images, and how many images they are to the model.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            One that [`divides_images`].
        pictures (`list`):
            Images.
        are_frames (`list[bool]`):
            Which of them are frames of videos: those are not divided.
        apart (`bool`):
            Whether every tile is an image of its own.
        kwargs:
            What the image processor takes.

    Returns:
        `pixel_values` and `image_sizes`, see [`TiledImages`], and the images that each picture is.
    """
    grid = kwargs.get(GRID) or image_processor.image_grid_pinpoints  # type: ignore[attr-defined]
    kwargs |= {"return_tensors": "pt", "do_pad": True}
    if all(are_frames):
        # The first tile shows all of an image; the fewer others there are, the better
        kwargs[GRID] = [min(grid, key=lambda size: size[0] * size[1])]
        tiles = image_processor(pictures, **kwargs)["pixel_values"]
        return {"pixel_values": tiles[:, 0].clone()}, [1] * len(pictures)
    made = image_processor(pictures, **kwargs)
    tiles, sizes = made["pixel_values"], made["image_sizes"]
    frames = torch.tensor(are_frames)
    sizes[frames] = torch.tensor(FRAME)
    tiles[frames, 1:] = 0
    if apart:
        tiles, sizes, counts = split_tiles(tiles, sizes, grid)
        return {"pixel_values": tiles, "image_sizes": sizes}, counts
    return {"pixel_values": tiles, "image_sizes": sizes}, [1] * len(pictures)


def check_grid(image_processor: BaseImageProcessor, grid: list[list[int]] | None) -> None:
    """
    Args:
        grid (`list[list[int]]`, *optional*): `image_grid_pinpoints` of the model, if it has any.

    Raises:
        ValueError: if images are not divided into the tiles that the model expects.
    """
    found = image_processor.image_grid_pinpoints if divides_images(image_processor) else None  # type: ignore[attr-defined]
    if (grid and [list(size) for size in grid]) != (found and [list(size) for size in found]):
        raise ValueError(
            f"the image processor has image_grid_pinpoints {found}, but the model {grid}; it does not "
            "belong to the model"
        )


def count_processed_tiles(image_processor: BaseImageProcessor, image_sizes: list[list[int]]) -> list[int]:
    """Tiles of images of these heights and widths, with the one that shows all of an image."""
    size = image_processor.crop_size or image_processor.size  # type: ignore[attr-defined]
    tile_size = size["height"] if "height" in size else size["shortest_edge"]
    grid = image_processor.image_grid_pinpoints  # type: ignore[attr-defined]
    return [count_tiles((height, width), grid, tile_size) for height, width in image_sizes]


__all__ = ["check_divides_images", "check_grid", "count_processed_tiles", "divides_images", "process_tiles"]
