"""What `generate` does with images: compresses them once, and finds the new ones of each turn of a conversation."""

from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin

from .attention_voco_llama import find_starts, resolve_num_voco_tokens


class VoCoLlamaGenerationMixin(GenerationMixin):
    """
    `generate` for a model with `get_image_features` and `get_voco_mask`, see [`VoCoLlamaModel`].
    """

    config: Any
    device: Any
    get_image_features: Any
    get_voco_mask: Any

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict, model_input_name: str | None, generation_config
    ) -> dict:
        """Compresses the images of a `generate` call once, before they are expanded to beams or cut into chunks."""
        mode = model_kwargs.get("attention_mode") or self.config.attention_mode
        if mode != "voco":
            raise ValueError(
                f'generate works in attention_mode="voco", got "{mode}"; to generate uncompressed, load these weights '
                "into LlavaForConditionalGeneration"
            )
        pixel_values, voco_cache, num_voco_tokens = (
            model_kwargs.pop(name, None) for name in ("pixel_values", "voco_cache", "num_voco_tokens")
        )
        embeds = inputs_tensor if model_input_name == "inputs_embeds" else None
        # Read where the host is: one wait for the device instead of one for every number
        voco_mask = self.get_voco_mask(inputs_tensor if embeds is None else None, embeds).cpu().numpy()
        seen = self._num_seen_tokens(inputs_tensor, model_kwargs, generation_config)
        if pixel_values is None and voco_cache is None:
            num_new = int(voco_mask[:, seen:].sum())
            is_checked = model_kwargs.get("mm_encoder_outputs") is None and not generation_config.is_assistant
            if num_new > 0 and is_checked:
                raise ValueError(f"the input has {num_new} <voco> tokens, but no pixel_values and no voco_cache")
            return model_kwargs
        if pixel_values is not None and voco_cache is not None:
            raise ValueError("pass the images either as pixel_values or as a voco_cache, not both")
        if voco_cache is not None and voco_mask[:, -1].any():
            raise ValueError("a prompt that uses a voco_cache must end with text, but its last token is <voco>")

        given = pixel_values if voco_cache is None else voco_cache
        if voco_cache is not None and num_voco_tokens is None:
            num_voco_tokens = voco_cache.token_counts
        images, counts = find_new_images(voco_mask, seen, num_voco_tokens, len(given))
        if images:
            new = given if len(images) == len(given) else given[images]
            model_kwargs["mm_encoder_outputs"] = {
                "image": self.get_image_features(new.to(self.device), counts)
                if voco_cache is None
                else self.get_image_features(None, counts, new)
            }
        return model_kwargs

    @staticmethod
    def _num_seen_tokens(inputs_tensor: torch.Tensor, model_kwargs: dict, generation_config) -> int:
        """Leading tokens of the input that `past_key_values` holds already, as `generate` has it."""
        past_key_values, attention_mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if past_key_values is None:
            return 0
        # `generate` drops a mask of ones and keeps its length; an input shorter than the mask is new altogether
        dropped_length = getattr(generation_config, "_mask_length", -1)
        mask_length = dropped_length if attention_mask is None else attention_mask.shape[1]
        repeats_history = inputs_tensor.ndim == 3 or mask_length == inputs_tensor.shape[1]
        return int(past_key_values.get_seq_length()) if repeats_history else 0

    def _expand_multimodal_outputs(
        self,
        input_ids: Any,
        mm_encoder_output: dict,
        expand_size: int = 1,
        inputs_embeds: Any = None,
    ) -> dict[str, dict]:
        """Images are told apart by the `<voco>` tokens of each row, of which earlier turns have had theirs."""
        images = mm_encoder_output.get("image")
        if images is not None:
            embeds = inputs_embeds if input_ids is None or input_ids.numel() == 0 else None
            voco_mask = self.get_voco_mask(input_ids if embeds is None else None, embeds)
            # `<voco>` tokens from each column on: those of the images at hand stand in the last columns
            left = voco_mask.sum(0).flip(0).cumsum(0).flip(0)
            new = left <= sum(len(image) for image in images.pooler_output)
            input_ids = input_ids[:, new] if embeds is None else input_ids
            inputs_embeds = None if embeds is None else embeds[:, new]
        return super()._expand_multimodal_outputs(  # type: ignore[misc]
            input_ids, mm_encoder_output, expand_size, inputs_embeds
        )


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


__all__ = ["VoCoLlamaGenerationMixin"]
