"""Images in batches, of which those of one length are compressed together, and what is left of them in order again."""

from collections.abc import Callable

import torch
from transformers.utils import logging

from .tiles_voco_llama import read_sizes


def compress_in_batches(
    read: Callable[..., torch.Tensor | list[torch.Tensor]],
    compress: Callable[[torch.Tensor, list[int]], list[torch.Tensor]],
    pixel_values: torch.Tensor,
    image_sizes: torch.Tensor | None,
    counts: list[int],
    batch_size: int,
    show_progress: bool,
) -> list[torch.Tensor]:
    """
    Args:
        read (`Callable`):
            From `pixel_values`, and `image_sizes` where there are any, of some images to their vision tokens: a tensor
            `(num_images, V, ...)`, or a list of `(V, ...)`.
        compress (`Callable`):
            From vision tokens of images of one length, and their numbers of VoCo tokens, to tensors whose first axis
            is these VoCo tokens.
        pixel_values, image_sizes, counts:
            Images, see [`TiledImages`], and their numbers of VoCo tokens.
        batch_size (`int`):
            Images at a time; where they are divided, as many tiles, but one image at least.
        show_progress (`bool`):
            Whether to show a progress bar when there is more than one batch.

    Raises:
        ValueError: if there is not one size an image.
    """
    order = list(range(len(counts)))
    if image_sizes is not None:
        sizes = read_sizes(image_sizes)
        if len(sizes) != len(counts):
            raise ValueError(f"image_sizes has {len(sizes)} sizes, but there are {len(counts)} images")
        # Images of one size have as many tokens, and are compressed together
        order.sort(key=lambda image: sizes[image])
    if pixel_values.ndim == 5:
        batch_size = max(1, batch_size // max(1, pixel_values.shape[1]))
    given = [pixel_values] if image_sizes is None else [pixel_values, image_sizes]
    starts = range(0, len(counts), batch_size)
    parts = []
    for start in logging.tqdm(starts, desc="Compressing images", disable=not show_progress or len(starts) == 1):
        images = order[start : start + batch_size]
        vision = read(*(_choose(tensor, images) for tensor in given))
        parts.append(_compress_batch(compress, vision, [counts[image] for image in images]))
    return _in_order(parts, counts, order)


def _choose(tensor: torch.Tensor, images: list[int]) -> torch.Tensor:
    """Some images of a tensor; those that follow each other are not copied."""
    first, last = images[0], images[-1]
    return tensor[first : last + 1] if images == list(range(first, last + 1)) else tensor[images]


def _compress_batch(
    compress: Callable[[torch.Tensor, list[int]], list[torch.Tensor]],
    vision: torch.Tensor | list[torch.Tensor],
    counts: list[int],
) -> list[torch.Tensor]:
    if isinstance(vision, torch.Tensor):
        return compress(vision, counts)
    lengths = [len(tokens) for tokens in vision]
    groups = [[image for image, own in enumerate(lengths) if own == length] for length in dict.fromkeys(lengths)]
    parts = [
        compress(torch.stack([vision[image] for image in images]), [counts[image] for image in images])
        for images in groups
    ]
    return _in_order(parts, counts, [image for images in groups for image in images])


def _in_order(parts: list[list[torch.Tensor]], counts: list[int], order: list[int]) -> list[torch.Tensor]:
    """What parts hold of tokens, as one: of images that follow `order` there, and image after image here."""
    joined = parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts)]
    if order == sorted(order):
        return joined
    spans = torch.arange(sum(counts)).split([counts[image] for image in order])
    places: dict[int, torch.Tensor] = dict(zip(order, spans))
    wanted = torch.cat([places[image] for image in range(len(order))])
    return [states[wanted.to(states.device)] for states in joined]


__all__ = ["compress_in_batches"]
