"""Images of several tiles: what a model whose vision side divides them has in common, and what is checked of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import initialization
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .configuration_voco_llama import VoCoLlamaConfig
from .runtime_voco_llama import awake, execution_device


# In place of a height and width: an image that is one tile, and a frame of a video
UNDIVIDED = (0, 0)
FRAME = (-1, -1)


class TiledImages:
    """
    Vision tokens of a model that divides images into tiles by their size, see [`VoCoLlamaModel`]. What makes tokens of
    tiles and packs them are methods of a class of transformers, which a subclass names.
    """

    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    vision_tower: torch.nn.Module
    get_image_features: Callable[..., Any]
    pack_image_features: Callable[..., tuple[list[torch.Tensor], torch.Tensor]]
    pack_options: Callable[[Any], dict[str, str]]  # what else it takes, from the configuration
    get_tile_features: Callable[..., torch.Tensor]

    def __init__(self, config: VoCoLlamaConfig):
        super().__init__(config)  # type: ignore[call-arg]
        self.image_newline = torch.nn.Parameter(torch.empty(config.text_config.hidden_size))  # type: ignore[union-attr]
        init_newline(self)

    def get_vision_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Vision tokens in the embedding space of the text model.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_tiles, 3, height, width)`, or without `num_tiles`):
                Preprocessed images; behind the tiles of an image are zeros up to the most that an image has.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width of each image before it was divided; (0, 0) for an image that is one tile, (-1, -1)
                for a frame of a video. By default all are frames.
            options:
                `vision_feature_layer` and `vision_feature_select_strategy`, instead of what the configuration says.

        Returns:
            A list of one `torch.Tensor` of shape `(V, hidden_size)` an image; if all are frames a `torch.Tensor` of
            shape `(num_images, V, hidden_size)`.

        Raises:
            ValueError: if the tiles are not those that `image_grid_pinpoints` divides images of these sizes into.
        """
        pixel_values = pixel_values.to(execution_device(self.vision_tower))
        options = {name: value for name, value in options.items() if value is not None}
        with awake(self):  # type: ignore[arg-type]
            if image_sizes is None:
                check_shape(pixel_values, 4)
                return self.get_frame_features(pixel_values, **options)
            sizes = read_sizes(image_sizes)
            tiles = pixel_values[:, None] if pixel_values.ndim == 4 else pixel_values
            check_shape(tiles, 5)
            check_tiles(tiles, sizes, self.config.image_grid_pinpoints)
            return self._features_by_kind(tiles, sizes, options)

    def _features_by_kind(
        self, tiles: torch.Tensor, sizes: list[tuple[int, int]], options: dict[str, Any]
    ) -> list[torch.Tensor]:
        kinds = [size if size in (UNDIVIDED, FRAME) else None for size in sizes]
        features: dict[int, torch.Tensor] = {}
        for kind in set(kinds):
            images = [image for image, own in enumerate(kinds) if own == kind]
            chosen = tiles if len(images) == len(sizes) else tiles[images]
            if kind is None:
                found = self.get_image_features(
                    chosen, image_sizes=[sizes[image] for image in images], return_dict=True, **options
                ).pooler_output
            elif kind == FRAME:
                found = self.get_frame_features(chosen[:, 0], **options)
            else:
                found = self.get_single_features(chosen[:, 0], **options)
            features |= zip(images, found)
        return [features[image] for image in range(len(sizes))]

    def get_single_features(self, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Tokens `(num_images, V, hidden_size)` of images that are one tile each."""
        tiles = [tokens[None] for tokens in self.get_tile_features(pixel_values, **options)]
        packed, _ = self.pack_image_features(
            tiles, [], image_newline=self.image_newline, **self.pack_options(self.config)
        )
        return torch.stack(packed)

    def get_frame_features(self, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Tokens `(num_images, V, hidden_size)` of frames of a video, each an image on its own."""
        return self.get_single_features(pixel_values, **options)


def init_newline(model: "TiledImages") -> None:
    """As the classes of transformers do."""
    initialization.normal_(model.image_newline, mean=0.0, std=model.config.text_config.hidden_size**-0.5)


def check_shape(pixel_values: torch.Tensor, ndim: int) -> None:
    """
    Raises:
        ValueError: if there are more or fewer dimensions.
    """
    if pixel_values.ndim != ndim:
        raise ValueError(
            f"pixel_values of shape {tuple(pixel_values.shape)} do not fit: (num_images, num_tiles, 3, height, width) "
            "with image_sizes, or (num_images, 3, height, width), was expected"
        )


def count_tiles(size: tuple[int, int], grid: list[list[int]], tile_size: int) -> int:
    """
    Tiles of an image, with the one that shows all of it.

    Args:
        size (`tuple[int, int]`):
            Its height and width.
        grid (`list[list[int]]`):
            `image_grid_pinpoints` of a model or of an image processor.
        tile_size (`int`):
            Height and width of a tile.
    """
    return 1 if size in (UNDIVIDED, FRAME) else image_size_to_num_patches(size, grid, tile_size)


def check_tiles(tiles: torch.Tensor, sizes: Sequence[tuple[int, int]], grid: list[list[int]]) -> list[int]:
    """
    Tiles of each image.

    Raises:
        ValueError: if there is a size that an image cannot have, or an image has fewer or more tiles than its size and
            the grid say.
    """
    if len(sizes) != len(tiles):
        raise ValueError(f"image_sizes has {len(sizes)} sizes, but there are {len(tiles)} images")
    if bad := [size for size in sizes if min(size) < 1 and size not in (UNDIVIDED, FRAME)]:
        raise ValueError(f"image_sizes must be heights and widths of at least 1, got {bad[0]}")
    given = tiles.shape[1]
    counts = [count_tiles(size, grid, tiles.shape[-1]) for size in sizes]
    reason = "the image processor divides images by another image_grid_pinpoints than the model"
    for size, count in zip(sizes, counts):
        if count > given:
            raise ValueError(f"an image of {size} has {given} tiles, but the model expects {count}: {reason}")
    if min(counts) < given and not tiles.is_meta:
        real = torch.arange(given, device=tiles.device) < torch.tensor(counts, device=tiles.device)[:, None]
        filled = tiles.flatten(2).any(-1) & ~real
        if filled.any():
            image = int(filled.any(-1).long().argmax())
            raise ValueError(
                f"an image of {sizes[image]} has more than the {counts[image]} tiles that the model expects: {reason}"
            )
    return counts


def read_sizes(image_sizes: torch.Tensor) -> list[tuple[int, int]]:
    """Height and width of each image on the host."""
    return [(int(height), int(width)) for height, width in image_sizes.tolist()]


def split_tiles(
    pixel_values: torch.Tensor, image_sizes: torch.Tensor, grid: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """
    Every tile as an image of its own, the one that shows all of an image in front of its parts.

    Args:
        pixel_values (`torch.Tensor` of shape `(num_images, num_tiles, 3, height, width)`):
            Images, see [`TiledImages`].
        image_sizes (`torch.LongTensor` of shape `(num_images, 2)`):
            Height and width of each. A frame of a video stays one.
        grid (`list[list[int]]`):
            `image_grid_pinpoints` by which they were divided.

    Returns:
        `pixel_values` of shape `(num_tiles, 3, height, width)`, `image_sizes` of shape `(num_tiles, 2)`, and how many
        tiles each image had.
    """
    check_shape(pixel_values, 5)
    sizes = read_sizes(image_sizes)
    counts = check_tiles(pixel_values, sizes, grid)
    apart = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts)])
    codes = [FRAME if size == FRAME else UNDIVIDED for size, count in zip(sizes, counts) for _ in range(count)]
    return apart, torch.tensor(codes, dtype=torch.long), counts


__all__ = ["FRAME", "UNDIVIDED", "TiledImages", "count_tiles", "init_newline", "split_tiles"]
