"""Images into VoCo tokens: for later questions, as a [`VoCoCache`], or for the batch in which they stand."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .cache_voco_llama import VoCoCache, check_cache
from .fingerprint_voco_llama import Fingerprint, FingerprintMemo
from .injection_voco_llama import CompressedImages, CompressionCache
from .layout_voco_llama import find_starts, per_image_counts, resolve_num_voco_tokens
from .rotation_voco_llama import check_rotation, rotate_keys
from .runtime_voco_llama import execution_device
from .tiles_voco_llama import split_tiles
from .two_stages_voco_llama import compress_images, compress_segments


COMPRESSION_BATCH_SIZE = 16


class VoCoLlamaCompressionMixin:
    """Compression for a model of a vision tower and a text model, see [`VoCoLlamaModel`]."""

    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    dtype: torch.dtype
    embed_ids: Callable[[list[int]], torch.Tensor]
    language_model: Any  # of whatever class the configuration names
    get_input_embeddings: Callable[[], torch.nn.Module]
    get_vision_features: Callable[..., Any]  # a tensor, or a list of tensors
    training: bool
    _fingerprint: FingerprintMemo
    _rotation_is_checked: bool

    def run_segments(self, pixel_values: torch.Tensor, num_voco_tokens: int) -> tuple[CompressionCache, torch.Tensor]:
        """
        One causal pass over a batch of segments: keys at positions 0..k-1, values and last hidden states
        `(num_images, num_voco_tokens, hidden_size)` of the VoCo tokens.
        """
        return compress_segments(self, self.get_vision_features(pixel_values), num_voco_tokens)

    @torch.no_grad()
    def compress(
        self,
        pixel_values: torch.Tensor | Iterable[torch.Tensor],
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        batch_size: int = COMPRESSION_BATCH_SIZE,
        show_progress: bool = True,
        exact: bool = True,
        image_sizes: torch.Tensor | None = None,
        num_voco_tokens_per_tile: int | None = None,
    ) -> VoCoCache:
        """
        Compresses images for later questions.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, or an `Iterable` of such tensors):
                Preprocessed images. An iterable is read as it is compressed: of a long video nothing but the VoCo
                tokens is ever held, see [`VoCoLlamaProcessor.iter_pixel_values`]. Images that are divided into tiles
                have the shape `(num_images, num_tiles, 3, height, width)`, and `image_sizes`.
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each (not for an iterable); `config.num_voco_tokens` by default.
            batch_size (`int`, *optional*, defaults to 16):
                Images that are compressed at a time, which bounds the memory; of images that are divided, as many
                tiles, but one image at least.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show a progress bar when there is more than one batch.
            exact (`bool`, *optional*, defaults to `True`):
                Whether to read all weights for the fingerprint, see [`~VoCoLlamaModel.fingerprint`]: 0.4 seconds a
                gigabyte on a CPU, which a program that compresses often and changes no weight can save.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width of each image before it was divided into tiles.
            num_voco_tokens_per_tile (`int`, *optional*):
                VoCo tokens of every tile, instead of `num_voco_tokens` of every image: each tile, and the one that
                shows all of the image, is compressed on its own, and is an entry of its own.

        Returns:
            [`VoCoCache`]: one entry an image, or a tile.

        Raises:
            ValueError: if there is no image, or `num_voco_tokens` does not fit the images.
        """
        if num_voco_tokens_per_tile is not None:
            if num_voco_tokens is not None or self.config.image_grid_pinpoints is None or image_sizes is None:
                raise ValueError(
                    "num_voco_tokens_per_tile takes the place of num_voco_tokens, and needs pixel_values and "
                    "image_sizes of images that were divided into tiles"
                )
            tiles: Any = pixel_values
            pixel_values, image_sizes, _ = split_tiles(tiles, image_sizes, self.config.image_grid_pinpoints)
            num_voco_tokens = num_voco_tokens_per_tile
        if not isinstance(pixel_values, torch.Tensor):
            if image_sizes is not None:
                raise ValueError("image_sizes are those of a tensor: an iterable is of frames, which are not divided")
            return self._compress_stream(pixel_values, num_voco_tokens, batch_size, show_progress, exact)
        fingerprint = self.fingerprint(exact)
        return self._compress_tensor(
            pixel_values, num_voco_tokens, batch_size, show_progress, fingerprint, image_sizes
        )

    def _compress_tensor(
        self,
        pixel_values: torch.Tensor,
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        batch_size: int,
        show_progress: bool,
        fingerprint: Fingerprint,
        image_sizes: torch.Tensor | None = None,
    ) -> VoCoCache:
        if len(pixel_values) == 0:
            raise ValueError("compress needs at least one image")
        self._check_rotation()
        wanted = self.config.num_voco_tokens if num_voco_tokens is None else num_voco_tokens
        counts = per_image_counts(wanted, len(pixel_values))
        keys, values, _ = compress_images(self, pixel_values, counts, batch_size, show_progress, image_sizes)
        # Under autocast rotated keys come in float32
        return VoCoCache(keys.to(values.dtype), values, counts, fingerprint)

    def _compress_stream(
        self,
        batches: Iterable[torch.Tensor],
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        batch_size: int,
        show_progress: bool,
        exact: bool,
    ) -> VoCoCache:
        if num_voco_tokens is not None and not isinstance(num_voco_tokens, int):
            raise ValueError("num_voco_tokens must be one number for all images of an iterable")
        fingerprint = self.fingerprint(exact)  # once for all batches
        stream: VoCoCache | None = None
        for batch in logging.tqdm(batches, desc="Compressing batches", disable=not show_progress):
            compressed = self._compress_tensor(batch, num_voco_tokens, batch_size, False, fingerprint)
            # In one growing buffer: many small tensors, kept between large ones, would fragment the memory
            if stream is None:
                stream = compressed
            else:
                stream.append(compressed)
        if stream is None:
            raise ValueError("compress needs at least one image")
        return VoCoCache.cat([stream])

    def get_compressed_images(
        self,
        pixel_values: torch.Tensor | None,
        voco_cache: VoCoCache | None,
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        voco_mask: np.ndarray,
        start: int = 0,
        image_indices: torch.Tensor | list[int] | None = None,
        **vision_options,
    ) -> CompressedImages:
        """
        Images of a batch compressed and put in their places.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images to compress.
            voco_cache ([`VoCoCache`], *optional*):
                Images that are compressed already, instead of `pixel_values`.
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each. By default the `<voco>` tokens are divided evenly.
            voco_mask (`np.ndarray` of shape `(batch_size, num_columns)`):
                True at the `<voco>` tokens of these images, and nowhere else.
            start (`int`, *optional*, defaults to 0):
                Column of the whole sequence at which the mask begins.
            image_indices (`list[int]` or `torch.LongTensor` of shape `(num_places,)`, *optional*):
                Which of the images stands in each place, see [`VoCoLlamaModel.forward`].
            vision_options:
                What [`VoCoLlamaModel.get_vision_features`] takes beside `pixel_values`.

        Raises:
            ValueError: if images, `<voco>` tokens and `num_voco_tokens` do not fit, or another model has made
                `voco_cache`.
        """
        given: Any = pixel_values if voco_cache is None else voco_cache  # one of both is there
        places = None if image_indices is None else check_image_indices(image_indices, len(given))
        counts = fit_counts(voco_mask, len(given if places is None else places), num_voco_tokens, voco_cache)
        self._check_rotation()
        if voco_cache is not None:
            check_cache(voco_cache, self.config, self.fingerprint(exact=False))
            keys, values, hidden_states = voco_cache.keys, voco_cache.values, None
        else:
            # With a gradient all of them stay in memory, however many are compressed at a time
            num_tiles = given.shape[:-3].numel()
            batch_size = num_tiles if torch.is_grad_enabled() else COMPRESSION_BATCH_SIZE
            most = counts if places is None else most_voco_tokens(places, counts, len(given))
            states = compress_images(self, given, most, batch_size, **vision_options)
            if places is not None:
                tokens = torch.tensor(first_voco_tokens(places, counts, most))
                states = [state[tokens.to(state.device)] for state in states]
            keys, values, hidden_states = states
        return CompressedImages.place(keys, values, hidden_states, counts, voco_mask, start)

    def rotate_keys(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        Moves keys by `positions` under the rotary embedding of the text model. Exact for every static RoPE.

        Args:
            keys (`torch.Tensor` of shape `(tokens, ..., head_dim)`): Keys after their own rotation.
            positions (`torch.LongTensor` of shape `(tokens,)`): How far to move each token, may be negative.

        Returns:
            `torch.Tensor` of the shape and dtype of `keys`; it is computed in float32.
        """
        return rotate_keys(keys, positions, self.language_model.rotary_emb)

    def _check_rotation(self) -> None:
        # Once: the text model stays what it is
        if self._rotation_is_checked or self.training or torch.compiler.is_compiling():
            return
        if execution_device(self.language_model).type != "meta":
            check_rotation(self)
            self._rotation_is_checked = True

    def fingerprint(self, exact: bool = True) -> Fingerprint:
        """
        What compressed images depend on: configuration, weights, active adapters, quantization. It is the same
        wherever the weights are, and equal to that of a copy of the model in another floating precision.

        Args:
            exact (`bool`, *optional*, defaults to `True`):
                Whether to read all weights, at the speed of memory. Otherwise what is known is returned unless a sign
                of change is seen, which costs a question next to nothing: a write that PyTorch counts is always seen,
                and so is one through `weight.data` to the embeddings of a segment or to a small model. Elsewhere it
                may take some questions until it is seen: each reads another part of the weights.
        """
        return self._fingerprint.get(self, exact)


def check_image_indices(image_indices: torch.Tensor | list[int], num_images: int) -> list[int]:
    """
    Which image stands in each place.

    Raises:
        ValueError: if there is no such image, or an image that stands nowhere.
    """
    indices = torch.as_tensor(image_indices)
    if indices.ndim != 1 or indices.is_floating_point() or indices.dtype == torch.bool:
        raise ValueError(f"image_indices must be a vector of integers, got {image_indices}")
    places = indices.tolist()
    if sorted(set(places)) != list(range(num_images)):
        raise ValueError(f"image_indices must name each of the {num_images} images of pixel_values, got {places}")
    return places


def most_voco_tokens(places: list[int], counts: list[int], num_images: int) -> list[int]:
    """The largest number of VoCo tokens that each image has in any place."""
    most = [0] * num_images
    for image, count in zip(places, counts):
        most[image] = max(most[image], count)
    return most


def first_voco_tokens(places: list[int], counts: list[int], most: list[int]) -> list[int]:
    """Of the VoCo tokens of images, those of each place: few are the first ones of many, which they do not see."""
    starts = list(accumulate(most, initial=0))
    return [starts[image] + offset for image, count in zip(places, counts) for offset in range(count)]


def fit_counts(
    voco_mask: np.ndarray,
    num_images: int,
    num_voco_tokens: int | list[int] | torch.Tensor | None,
    voco_cache: VoCoCache | None,
) -> list[int]:
    """
    VoCo tokens of each image of a call.

    Raises:
        ValueError: if images, `<voco>` tokens, `num_voco_tokens` and what a `voco_cache` holds do not fit.
    """
    if voco_cache is not None and num_voco_tokens is None:
        num_voco_tokens = voco_cache.token_counts
    counts = resolve_num_voco_tokens(num_voco_tokens, num_images, int(voco_mask.sum()))
    find_starts(voco_mask, counts)
    return counts if voco_cache is None else voco_cache.resolve(counts)


__all__ = ["COMPRESSION_BATCH_SIZE", "VoCoLlamaCompressionMixin", "check_image_indices", "fit_counts"]
