"""`generate` with images: they are compressed once, before anything else, and handed on with their places."""

from .compat_voco_llama import CACHE, CHUNKS_FOLLOW_A_CACHE


# isort: split
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Cache, GenerationConfig, GenerationMixin

from .cache_voco_llama import VoCoCache
from .injection_voco_llama import CompressedImages
from .layout_voco_llama import find_starts, resolve_num_voco_tokens
from .runtime_voco_llama import without_checkpointing


class VoCoLlamaGenerationMixin(GenerationMixin):
    """
    `generate` for a model with `get_compressed_images` and `get_voco_mask`, see [`VoCoLlamaModel`], whose `forward`
    takes `compressed_images`.
    """

    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    get_compressed_images: Callable[..., CompressedImages]
    get_voco_mask: Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        pixel_values: torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        attention_mode: str | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        See [`~transformers.GenerationMixin.generate`], and:

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images in the order in which they stand in the batch. A later turn of a conversation brings its own, or
                those of all turns again.
            voco_cache ([`VoCoCache`], *optional*):
                The images compressed already, instead of `pixel_values`.
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each. By default the `<voco>` tokens are divided evenly.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                See [`VoCoLlamaModel.forward`].

        Raises:
            ValueError: if images, `<voco>` tokens and `num_voco_tokens` do not fit, a prompt ends with a cached image,
                `attention_mode` is not `"voco"`, or `image_indices` are given.
        """
        mode = self.config.attention_mode if attention_mode is None else attention_mode
        if mode != "voco":
            raise ValueError(
                f'generate works in attention_mode="voco", got "{mode}"; to generate uncompressed, load these weights '
                "into LlavaForConditionalGeneration"
            )
        if kwargs.get("image_indices") is not None:
            raise ValueError(
                "generate takes no image_indices: compress images that stand in several places once, and pass "
                "voco_cache=cache[indices]"
            )
        if attention_mode is not None:
            kwargs["attention_mode"] = attention_mode
        if pixel_values is not None and voco_cache is not None:
            raise ValueError("pass the images either as pixel_values or as a voco_cache, not both")
        cache = next((kwargs.pop(name) for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        is_assistant = generation_config is not None and generation_config.is_assistant
        if is_assistant:
            # It is handed what the model that it drafts for was given, which need not fit it
            kwargs.pop("compressed_images", None)
        elif kwargs.get("compressed_images") is None:
            kwargs["compressed_images"] = self._compress_new_images(
                inputs if kwargs.get("input_ids") is None else kwargs["input_ids"],
                kwargs.get("inputs_embeds"),
                kwargs.get("attention_mask"),
                num_seen_tokens(cache),
                pixel_values,
                voco_cache,
                num_voco_tokens,
                image_sizes,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
            )
        if cache is not None:
            kwargs[CACHE] = cache
            if num_seen_tokens(cache) > 0 and not CHUNKS_FOLLOW_A_CACHE:
                # In one piece: slower than wished for, but right
                kwargs["prefill_chunk_size"] = None
        with without_checkpointing(self):  # type: ignore[arg-type]
            return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def _compress_new_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        num_cached: int,
        pixel_values: torch.Tensor | None,
        voco_cache: VoCoCache | None,
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        image_sizes: torch.Tensor | None,
        **vision_options,
    ) -> CompressedImages | None:
        """The images that the cache of earlier turns does not hold yet."""
        if input_ids is None and inputs_embeds is None:
            return None
        # Read where the host is: one wait for the device instead of one for every number
        voco_mask = self.get_voco_mask(input_ids if inputs_embeds is None else None, inputs_embeds).cpu().numpy()
        # An input shorter than its mask is new altogether, as `generate` has it; any other begins with the history
        repeats_history = (
            inputs_embeds is not None or attention_mask is None or attention_mask.shape[1] == voco_mask.shape[1]
        )
        seen = num_cached if repeats_history else 0
        if pixel_values is None and voco_cache is None:
            num_new = int(voco_mask[:, seen:].sum())
            if num_new > 0:
                raise ValueError(f"the input has {num_new} <voco> tokens, but no pixel_values and no voco_cache")
            return None
        if voco_cache is not None and voco_mask[:, -1].any():
            raise ValueError("a prompt that uses a voco_cache must end with text, but its last token is <voco>")
        given: Any = pixel_values if voco_cache is None else voco_cache  # one of both is there
        if voco_cache is not None and num_voco_tokens is None:
            num_voco_tokens = voco_cache.token_counts
        images, counts = find_new_images(voco_mask, seen, num_voco_tokens, len(given))
        if not images:
            return None
        new = given if len(images) == len(given) else given[images]
        pixels, cached = (new, None) if voco_cache is None else (None, new)
        if pixels is not None and image_sizes is not None:
            vision_options["image_sizes"] = image_sizes[images]
        return self.get_compressed_images(pixels, cached, counts, voco_mask[:, seen:], num_cached, **vision_options)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: torch.LongTensor, *, inputs_embeds: torch.Tensor | None = None, **kwargs
    ) -> dict[str, Any]:
        """See [`~transformers.GenerationMixin.prepare_inputs_for_generation`]."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        images = inputs.get("compressed_images")
        # A pass without images is one over text: a compiled step of decoding never hears of them
        if images is not None:
            run = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            if not images.stand_in(num_seen_tokens(inputs.get(CACHE)), run.shape[1]):
                del inputs["compressed_images"]
        return inputs


def num_seen_tokens(cache: Cache | None) -> int:
    """Columns that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def find_new_images(
    voco_mask: np.ndarray, seen: int, num_voco_tokens: int | list[int] | torch.Tensor | None, num_images: int
) -> tuple[list[int], list[int]]:
    """
    Which of the images given to a turn of a conversation are new, and their numbers of VoCo tokens. A turn may bring
    its own images only, or those of all turns again.

    Args:
        voco_mask (`np.ndarray` of shape `(batch_size, sequence_length)`):
            True at `<voco>` tokens of the input.
        seen (`int`):
            Leading tokens of the input that earlier turns have left in the key-value cache.

    Raises:
        ValueError: if the images fit neither all `<voco>` tokens nor the new ones, or both.
    """
    num_tokens, new_mask = int(voco_mask.sum()), voco_mask[:, seen:]
    all_starts = None
    if num_tokens != int(new_mask.sum()):
        try:
            all_counts = resolve_num_voco_tokens(num_voco_tokens, num_images, num_tokens)
            all_starts = find_starts(voco_mask, all_counts)
        except ValueError:  # not the images of all turns
            pass
    try:
        counts = resolve_num_voco_tokens(num_voco_tokens, num_images, int(new_mask.sum()))
        find_starts(new_mask, counts)
    except ValueError:
        if all_starts is None:
            raise
        images = (all_starts >= seen).nonzero()[0].tolist()
        return images, [all_counts[image] for image in images]
    if all_starts is not None:
        raise ValueError(
            f"{num_images} images fit the {num_tokens} <voco> tokens of all turns as well as the new ones: "
            "pass num_voco_tokens, one number an image"
        )
    return list(range(num_images)), counts


__all__ = ["VoCoLlamaGenerationMixin", "find_new_images", "num_seen_tokens"]
