"""PyTorch VoCo-LLaMA: a LLaVA whose language model compresses every image into a few VoCo tokens.

Two ways to compute, one result. Single pass: the long sequence once, under the VoCo attention mask. Two stages: every
image on its own under plain causal attention, then the short sequence with the keys and values of the VoCo tokens
injected into its cache.
"""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import and_masks, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention_voco_llama import (
    ExpandedLayout,
    VoCoRuns,
    find_starts,
    group_positions,
    per_image_counts,
    position_window_function,
    resolve_num_voco_tokens,
    text_group_function,
    voco_mask_function,
)
from .cache_voco_llama import VoCoCache
from .configuration_voco_llama import VoCoLlamaConfig, check_text_config, key_value_shape, layer_types, sliding_window
from .fingerprint_voco_llama import Fingerprint, FingerprintMemo, check_fingerprint
from .generation_voco_llama import VoCoLlamaGenerationMixin


ATTENTION_MODES = ("voco", "causal", "uncompressed")
MASKABLE_ATTENTION = ("eager", "sdpa", "flex_attention")
COMPRESSION_BATCH_SIZE = 16
ROTATION_BLOCK_SIZE = 256  # tokens whose keys are rotated at a time, in float32
# Behind columns that are left out attention needs a mask, which costs about as much as an eighth more columns
MIN_FRONT_SHARE = 1 / 8

# Checkpoints of the first LLaVA classes name their weights in an older way
for name, llava_name in (("voco_llama", "llava"), ("VoCoLlamaModel", "LlavaModel")):
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(llava_name), overwrite=True)


class CompressionCache(Cache):
    """Keeps the keys and values of the last `num_kept` tokens of one pass, and nothing of the image."""

    def __init__(self, num_kept: int):
        super().__init__(layers=[])
        self.num_kept = num_kept
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        self.keys.append(key_states[:, :, -self.num_kept :].clone())
        self.values.append(value_states[:, :, -self.num_kept :].clone())
        return key_states, value_states


class InjectionCache(Cache):
    """
    Puts the keys and values of compressed images among those of text, on their way into another cache, of whatever
    kind: dynamic, static, quantized, offloaded. It is updated once, by one pass.

    Args:
        cache ([`~transformers.Cache`]):
            The cache that is filled.
        front (`list[torch.Tensor]`):
            Keys and values `(batch_size, num_columns, layers, key_value_heads, head_dim)` of columns in front of all
            text.
        num_left_out (`int`):
            How many of these columns the pass leaves out; it computes keys and values of the others in vain.
        among (`list[torch.Tensor]`):
            Keys and values `(num_tokens, layers, key_value_heads, head_dim)` that replace those of `<voco>` tokens of
            the pass.
        rows, columns (`torch.LongTensor` of shape `(num_tokens,)`):
            Where these tokens stand behind the columns in front.
    """

    def __init__(
        self,
        cache: Cache,
        front: list[torch.Tensor],
        num_left_out: int,
        among: list[torch.Tensor],
        rows: torch.Tensor,
        columns: torch.Tensor,
    ):
        super().__init__(layers=cache.layers)
        self.cache = cache
        self.num_front, self.num_left_out = front[0].shape[1], num_left_out
        # Views by layer are made at once: in a short pass every call from Python counts
        self.front = [states.permute(2, 0, 3, 1, 4).unbind() for states in front]
        self.among = [states.unbind(1) for states in among]
        self.rows, self.columns = rows, columns

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        num_run = self.num_front - self.num_left_out
        states = [key_states[:, :, num_run:], value_states[:, :, num_run:]]
        if len(self.rows) > 0:
            places = self.rows.to(key_states.device), self.columns.to(key_states.device)
            for kind, among in enumerate(self.among):
                by_token = states[kind].transpose(1, 2).index_put(places, among[layer_idx].to(states[kind]))
                states[kind] = by_token.transpose(1, 2)
        if self.num_front > 0:
            front = [kind[layer_idx].to(own) for kind, own in zip(self.front, states)]
            layer = self.cache.layers[layer_idx] if layer_idx < len(self.cache.layers) else None
            if type(layer) is DynamicLayer and not layer.is_initialized:
                # What it holds it copies with every update anyway
                layer.lazy_initialization(*front)
                layer.keys, layer.values = front
            else:
                states = [torch.cat(parts, dim=2) for parts in zip(front, states)]
        return self.cache.update(states[0], states[1], layer_idx, *args, **kwargs)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.cache.get_query_offset(layer_idx) + self.num_left_out

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length + self.num_left_out, layer_idx)


class VoCoLlamaPreTrainedModel(LlavaPreTrainedModel):
    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    config_class = VoCoLlamaConfig

    def save_pretrained(self, *args, **kwargs):
        """
        See [`~transformers.PreTrainedModel.save_pretrained`]. Weights keep the names of the model's parameters: a
        trainer that resumes would not find them by the older ones of LLaVA.
        """
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})


class VoCoLlamaModel(VoCoLlamaPreTrainedModel, LlavaModel):
    """
    The VoCo-LLaMA model without a language modeling head. Submodules and parameter names are those of
    [`~transformers.LlavaModel`].

    Raises:
        ValueError: if compressed images cannot be moved to other positions with the text model of `config`.
    """

    def __init__(self, config: VoCoLlamaConfig):
        text_config: Any = config.text_config
        check_text_config(text_config)
        super().__init__(config)
        self._fingerprint = FingerprintMemo()
        self._rotation_is_checked = False

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """
        Vision tokens in the embedding space of the text model: what LLaVA puts into the sequence.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`): Preprocessed images.

        Returns:
            `torch.Tensor` of shape `(num_images, V, hidden_size)`.
        """
        # As LlavaModel.get_image_features does, whose list of images would fix their number in an exported graph
        layers = self.config.vision_feature_layer
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=layers, return_dict=True).hidden_states
        chosen = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [states[:, 1:] for states in chosen]
        return self.multi_modal_projector(torch.cat(chosen, dim=-1))

    def get_image_features(
        self,
        pixel_values: Any = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling:
        """
        Compressed images as features: what `generate` hands from the encoding of images to the prefill.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                Images to compress.
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each; `config.num_voco_tokens` by default.
            voco_cache ([`VoCoCache`], *optional*):
                Images that are compressed already, instead of `pixel_values`.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPooling`]: its `pooler_output` has
            `(k, 2 * layers * key_value_heads * head_dim + hidden_size)` numbers an image: one tensor where all images
            have the same k, else a list of tensors. Row j of an image holds the keys of its j-th VoCo token, rotated
            to position 0, its values and its last hidden state (unknown to a [`VoCoCache`]).

        Raises:
            ValueError: if `voco_cache` was made by another model or has other numbers of VoCo tokens.
        """
        if (voco_cache is None) == (pixel_values is None):
            raise ValueError("pass the images either as pixel_values or as a voco_cache")
        self._check_rotation()
        if voco_cache is not None:
            check_fingerprint(voco_cache.fingerprint, self.fingerprint(), "this one")
            counts = voco_cache.resolve(num_voco_tokens)
            states = [voco_cache.keys, voco_cache.values]
        else:
            counts = self._per_image_counts(num_voco_tokens, pixel_values)
            # With a gradient all of them stay in memory, however many are compressed at a time
            batch_size = len(pixel_values) if torch.is_grad_enabled() else COMPRESSION_BATCH_SIZE
            states = self._compress(pixel_values, counts, batch_size)
        if max(counts) > 1:
            offsets = torch.tensor([offset for count in counts for offset in range(count)], device=states[0].device)
            states[0] = self.rotate_keys(states[0], -offsets)
        rows = torch.cat([tensor.flatten(1) for tensor in states], dim=-1)
        images: Any = list(rows.split(counts)) if len(set(counts)) > 1 else rows.unflatten(0, (len(counts), -1))
        return BaseModelOutputWithPooling(pooler_output=images)

    def _per_image_counts(
        self, num_voco_tokens: int | list[int] | torch.Tensor | None, pixel_values: torch.Tensor
    ) -> list[int]:
        return per_image_counts(
            self.config.num_voco_tokens if num_voco_tokens is None else num_voco_tokens, len(pixel_values)
        )

    def _compress(
        self,
        pixel_values: torch.Tensor,
        counts: list[int],
        batch_size: int = COMPRESSION_BATCH_SIZE,
        show_progress: bool = False,
    ) -> list[torch.Tensor]:
        """
        First stage: keys at positions 0..k-1, values (both `(tokens, layers, key_value_heads, head_dim)`) and last
        hidden states `(tokens, hidden_size)` of the VoCo tokens of all images.
        """
        starts = range(0, len(pixel_values), batch_size)
        parts = [
            self._compress_batch(pixel_values[start : start + batch_size], counts[start : start + batch_size])
            for start in logging.tqdm(starts, desc="Compressing images", disable=not show_progress or len(starts) == 1)
        ]
        return parts[0] if len(parts) == 1 else [torch.cat(tensors) for tensors in zip(*parts)]

    def _compress_batch(self, pixel_values: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        # Images with fewer VoCo tokens are padded on the right, which causal attention never looks at
        length = max(counts)
        kept, hidden_states = self.run_segments(pixel_values, length)
        keys, values = (
            torch.stack([layer.transpose(1, 2).to(hidden_states.device) for layer in layers], dim=2)
            for layers in (kept.keys, kept.values)
        )
        by_token = [states.flatten(0, 1) for states in (keys, values, hidden_states)]
        if len(set(counts)) == 1:
            return by_token
        wanted = [length * image + offset for image, count in enumerate(counts) for offset in range(count)]
        return [states[torch.tensor(wanted, device=states.device)] for states in by_token]

    def run_segments(self, pixel_values: torch.Tensor, num_voco_tokens: int) -> tuple[CompressionCache, torch.Tensor]:
        """
        One causal pass over a batch of segments: keys at positions 0..k-1, values and last hidden states
        `(num_images, num_voco_tokens, hidden_size)` of the VoCo tokens.
        """
        vision = self.get_vision_features(pixel_values.to(self.vision_tower.device))
        before, suffix, voco = (
            self._embed_ids(ids).expand(vision.shape[0], -1, -1)
            for ids in (
                self.config.vision_prefix_token_ids,
                self.config.vision_suffix_token_ids,
                [self.config.voco_token_id],
            )
        )
        segments = torch.cat([before, vision.to(before), suffix, voco.expand(-1, num_voco_tokens, -1)], dim=1)
        positions = torch.arange(num_voco_tokens - segments.shape[1], num_voco_tokens, device=segments.device)
        kept = CompressionCache(num_voco_tokens)
        hidden_states = self.language_model(
            inputs_embeds=segments, position_ids=positions[None], past_key_values=kept, use_cache=True
        ).last_hidden_state[:, -num_voco_tokens:]
        return kept, hidden_states

    def _embed_ids(self, token_ids: list[int]) -> torch.Tensor:
        """Embeddings `(len(token_ids), hidden_size)`."""
        embedding: Any = self.get_input_embeddings()
        return embedding(torch.tensor(token_ids, dtype=torch.long, device=embedding.weight.device))

    @torch.no_grad()
    def compress(
        self,
        pixel_values: torch.Tensor | Iterable[torch.Tensor],
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        batch_size: int = COMPRESSION_BATCH_SIZE,
        show_progress: bool = True,
    ) -> VoCoCache:
        """
        Compresses images for later questions.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, or an `Iterable` of such tensors):
                Preprocessed images. An iterable is read as it is compressed: of a long video nothing but the VoCo
                tokens is ever held, see [`VoCoLlamaProcessor.iter_pixel_values`].
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each (not for an iterable); `config.num_voco_tokens` by default.
            batch_size (`int`, *optional*, defaults to 16):
                Images that are compressed at a time, which bounds the memory.
            show_progress (`bool`, *optional*, defaults to `True`):
                Whether to show a progress bar when there is more than one batch.

        Returns:
            [`VoCoCache`]: one entry an image.

        Raises:
            ValueError: if there is no image, or `num_voco_tokens` does not fit the images.
        """
        if not isinstance(pixel_values, torch.Tensor):
            return self._compress_stream(pixel_values, num_voco_tokens, batch_size, show_progress)
        if len(pixel_values) == 0:
            raise ValueError("compress needs at least one image")
        self._check_rotation()
        counts = self._per_image_counts(num_voco_tokens, pixel_values)
        keys, values, _ = self._compress(pixel_values, counts, batch_size, show_progress)
        # Under autocast rotated keys come in float32
        return VoCoCache(keys.to(values.dtype), values, counts, self.fingerprint())

    def _compress_stream(
        self,
        batches: Iterable[torch.Tensor],
        num_voco_tokens: int | list[int] | torch.Tensor | None,
        batch_size: int,
        show_progress: bool,
    ) -> VoCoCache:
        if num_voco_tokens is not None and not isinstance(num_voco_tokens, int):
            raise ValueError("num_voco_tokens must be one number for all images of an iterable")
        stream: VoCoCache | None = None
        for batch in logging.tqdm(batches, desc="Compressing batches", disable=not show_progress):
            compressed = self.compress(batch, num_voco_tokens, batch_size, show_progress=False)
            # In one growing buffer: many small tensors, kept between large ones, would fragment the memory
            if stream is None:
                stream = compressed
            else:
                stream.append(compressed)
        if stream is None:
            raise ValueError("compress needs at least one image")
        return VoCoCache.cat([stream])

    def _split_rows(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of compressed images as `(tokens, 2, layers, heads, head_dim)` and, where known, last hidden states."""
        layers, heads, head_dim = key_value_shape(self.config.text_config)
        size = 2 * layers * heads * head_dim
        if rows.shape[-1] not in (size, size + self.config.text_config.hidden_size):
            raise ValueError(
                f"compressed images of this model have {size} numbers a VoCo token ({layers} layers, {heads} "
                f"key-value heads of size {head_dim}), got {rows.shape[-1]}: they come from another model"
            )
        hidden_states = rows[:, size:] if rows.shape[-1] > size else None
        return rows[:, :size].view(-1, 2, layers, heads, head_dim), hidden_states

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

    @torch.no_grad()
    def _check_rotation(self) -> None:
        """
        Moves a key and compares, once: a lone token reads nothing but itself, so its position shows in keys only.

        Raises:
            ValueError: if the text model rotates in another way, or some of its layers do not rotate at all.
        """
        if self._rotation_is_checked or self.training or self.device.type == "meta" or torch.compiler.is_compiling():
            return
        token = torch.linspace(-1, 1, self.config.text_config.hidden_size, dtype=self.dtype, device=self.device)
        token = token.expand(2, 1, -1)
        kept, distance = CompressionCache(1), 7
        positions = torch.tensor([[0], [distance]], device=token.device)
        self.language_model(inputs_embeds=token, position_ids=positions, past_key_values=kept, use_cache=True)
        for key in kept.keys:
            here, there = key[:1, :, 0].float(), key[1:, :, 0].float()
            try:
                error = (self.rotate_keys(here, positions[1]) - there).norm() / there.norm()
            except RuntimeError as reason:
                error = reason
            if isinstance(error, RuntimeError) or not error <= 0.05:
                raise ValueError(
                    f"the keys of {self.config.text_config.model_type} cannot be moved to other positions: VoCo-LLaMA "
                    "needs a text model that rotates whole keys in every layer"
                )
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

    def get_voco_mask(self, input_ids: torch.Tensor | None, inputs_embeds: Any) -> torch.Tensor:
        """`(batch_size, sequence_length)` mask of the `<voco>` tokens of a sequence given as ids or as embeddings."""
        if input_ids is not None:
            return input_ids == self.config.voco_token_id
        voco_embed = self._embed_ids([self.config.voco_token_id])[0]
        return torch.eq(inputs_embeds, voco_embed.to(inputs_embeds)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        attention_mode: str | None = None,
        text_groups: torch.LongTensor | None = None,
        two_stages: bool | None = None,
        use_cache: bool | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The short sequence, in which an image is its `<voco>` tokens.
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`, *optional*):
                All images of the batch, in the order in which they stand in it.
            num_voco_tokens (`int`, `list[int]` or `torch.LongTensor`, *optional*):
                VoCo tokens of every image, or of each. By default the `<voco>` tokens are divided evenly.
            voco_cache ([`VoCoCache`], *optional*):
                The images compressed already, instead of `pixel_values`. Outputs at `<voco>` positions are then
                undefined: a [`VoCoCache`] does not keep hidden states.
            attention_mode (`str`, *optional*):
                `"voco"`, `"causal"` or `"uncompressed"`; `config.attention_mode` by default.
            text_groups (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Lets one row ask many questions about its images, each as if it were alone: a token sees those of group
                0 and of its own, and is numbered behind the tokens of group 0. `<voco>` tokens belong to group 0, and
                the tokens of a group are neighbours.
            two_stages (`bool`, *optional*):
                Whether images are compressed first, all together, and the short sequence reads what is left of them,
                or the long sequence is run at once, whose cost grows with the square of its images. By default with a
                cache, and where the attention takes no masks.
            use_cache (`bool`, *optional*):
                Whether to return a cache of the short sequence.
            mm_encoder_outputs (`dict[str, BaseModelOutputWithPooling]`, *optional*):
                The images as [`get_image_features`] returned them, under the key `"image"`.

        Returns:
            [`~transformers.models.llava.modeling_llava.LlavaModelOutputWithPast`], aligned with the short sequence.
            `attentions` of a single pass are those of the long sequence.

        Raises:
            ValueError: if images, `<voco>` tokens and `num_voco_tokens` do not fit, or the modes cannot be combined.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        mode = self.config.attention_mode if attention_mode is None else attention_mode
        if mode not in ATTENTION_MODES:
            raise ValueError(f"attention_mode must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
        features = mm_encoder_outputs.get("image") if mm_encoder_outputs is not None else None
        if sum(images is not None for images in (pixel_values, voco_cache, features)) > 1:
            raise ValueError("pass the images once: as pixel_values, as a voco_cache or as mm_encoder_outputs")
        if mode != "voco" and (voco_cache is not None or features is not None or past_key_values is not None):
            raise ValueError(
                f'attention_mode="{mode}" needs the pixels of all images and no cache; to generate uncompressed, load '
                "these weights into LlavaForConditionalGeneration"
            )
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        language_inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        two_stages = self._runs_in_two_stages(two_stages, mode, use_cache, past_key_values)
        has_images = any(images is not None for images in (pixel_values, voco_cache, features))
        if text_groups is not None and not (has_images and past_key_values is None and self._takes_masks()):
            raise ValueError(
                "text_groups needs images, no past_key_values, and an attention that takes masks "
                f"({', '.join(MASKABLE_ATTENTION)})"
            )
        voco_mask: Any = self.get_voco_mask(input_ids, inputs_embeds) if has_images else None
        if has_images and (two_stages or pixel_values is None):
            # Read where the host is: one wait for the device instead of one for every number
            voco_mask = voco_mask.cpu().numpy()
        # Later calls of one conversation may bring images along that its cache holds already
        if not has_images or (features is not None and not voco_mask.any()):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds, past_key_values=past_key_values, use_cache=use_cache, **language_inputs
            )
            return LlavaModelOutputWithPast(**outputs)

        if features is None:
            images: Any = pixel_values if voco_cache is None else voco_cache
            if voco_cache is not None and num_voco_tokens is None:
                num_voco_tokens = voco_cache.token_counts
            counts = resolve_num_voco_tokens(num_voco_tokens, len(images), int(voco_mask.sum()))
            if pixel_values is not None and not two_stages:
                runs = VoCoRuns.find(voco_mask, counts)
                return self._forward_expanded(
                    inputs_embeds, pixel_values, runs, mode, text_groups=text_groups, **language_inputs
                )
            find_starts(voco_mask, counts)
            features = self.get_image_features(pixel_values, counts, voco_cache)
        rows: Any = features.pooler_output
        return self._forward_injected(
            inputs_embeds, rows, voco_mask, past_key_values, use_cache, text_groups, **language_inputs
        )

    def _takes_masks(self) -> bool:
        return self.config.text_config._attn_implementation in MASKABLE_ATTENTION

    def _runs_in_two_stages(
        self, two_stages: bool | None, mode: str, use_cache: bool, past_key_values: Cache | None
    ) -> bool:
        if mode != "voco":
            return False
        # Gradient checkpointing switches caches off, and with them the injection
        if self.training and self.language_model.gradient_checkpointing and past_key_values is None:
            if two_stages:
                raise ValueError("gradient checkpointing needs the single pass: two_stages cannot be True")
            if not self._takes_masks():
                raise ValueError(
                    "gradient checkpointing needs the single pass, whose mask "
                    f"{self.config.text_config._attn_implementation} cannot apply: use {', '.join(MASKABLE_ATTENTION)}"
                )
            return False
        if two_stages is None:
            return use_cache or past_key_values is not None or not self._takes_masks()
        if not two_stages and (use_cache or past_key_values is not None or not self._takes_masks()):
            raise ValueError("two_stages=False needs use_cache=False and an attention that takes masks")
        return two_stages

    def _forward_expanded(
        self,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor,
        runs: VoCoRuns,
        mode: str,
        text_groups: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """Single pass: every image gets its vision tokens, and what was computed is gathered back."""
        batch_size, short_length, hidden_size = inputs_embeds.shape
        vision = self.get_vision_features(pixel_values).to(inputs_embeds)
        prefix, suffix = (
            self._embed_ids(ids) for ids in (self.config.vision_prefix_token_ids, self.config.vision_suffix_token_ids)
        )
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, short_length, dtype=torch.bool, device=inputs_embeds.device)
        layout = ExpandedLayout.build(runs, attention_mask, len(prefix), vision.shape[1], len(suffix), mode)

        by_token = layout.short[..., None].expand(-1, -1, hidden_size)
        embeds = inputs_embeds.new_zeros(batch_size, layout.length, hidden_size).scatter(1, by_token, inputs_embeds)
        embeds = embeds.index_put((runs.rows[:, None], layout.vision), vision)
        embeds = embeds.index_put((layout.prefix_rows[:, None], layout.prefix), prefix.to(embeds))
        embeds = embeds.index_put((runs.rows[:, None], layout.suffix), suffix[: layout.suffix.shape[1]].to(embeds))
        mask = layout.attention_mask(attention_mask, runs)
        columns = torch.arange(short_length, device=embeds.device)[None]
        if position_ids is None:
            position_ids = columns if text_groups is None else group_positions(text_groups)
        rules = []
        if text_groups is not None:
            groups = torch.zeros_like(mask, dtype=torch.long).scatter(1, layout.short, text_groups)
            rules.append(text_group_function(groups))
        if mode == "voco":
            positions = layout.compact_positions(position_ids.expand(batch_size, -1), runs)
            rules.append(voco_mask_function(*layout.segments(runs, batch_size)))
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            if text_groups is not None:
                positions = positions.scatter_add(1, layout.short, position_ids - columns)
        if rules:
            mask = self._masked_attention(embeds, mask, positions, and_masks(*rules))

        outputs: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **kwargs
        )
        hidden_states = outputs.hidden_states
        if hidden_states is not None:
            hidden_states = tuple(states.gather(1, by_token) for states in hidden_states)
        last_hidden_state: Any = outputs.last_hidden_state
        return LlavaModelOutputWithPast(
            last_hidden_state=last_hidden_state.gather(1, by_token),
            hidden_states=hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=vision,
        )

    def _masked_attention(
        self, embeds: torch.Tensor, padding_mask: torch.Tensor | None, positions: torch.Tensor, rule: Callable
    ):
        """A finished mask, in the form that the text model's attention takes."""
        config = self.config.text_config
        full = create_causal_mask(config, embeds, padding_mask, past_key_values=None, and_mask_function=rule)
        window = sliding_window(config)
        if window is None:
            return full
        rule = and_masks(rule, position_window_function(positions, window))
        sliding = create_causal_mask(config, embeds, padding_mask, past_key_values=None, and_mask_function=rule)
        is_mixed = "full_attention" in layer_types(config)
        return {"full_attention": full, "sliding_attention": sliding} if is_mixed else sliding

    def _forward_injected(
        self,
        inputs_embeds: torch.Tensor,
        images: Any,
        voco_mask: np.ndarray,
        past_key_values: Cache | None,
        use_cache: bool,
        text_groups: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> LlavaModelOutputWithPast:
        """
        Second stage: the short sequence under plain causal attention, with the compressed images in place. Columns in
        front of all text are left out where they are many: nothing but their keys and values is ever read.

        Args:
            images (`torch.Tensor` or `list[torch.Tensor]`): What [`get_image_features`] returned.
            voco_mask (`np.ndarray` of shape `(batch_size, sequence_length)`): True at `<voco>` tokens.
        """
        cache = DynamicCache(config=self.config.text_config) if past_key_values is None else past_key_values
        batch_size, length = voco_mask.shape
        device = inputs_embeds.device
        mask: Any = attention_mask
        if text_groups is not None:
            position_ids = group_positions(text_groups) if position_ids is None else position_ids
            mask = self._masked_attention(inputs_embeds, mask, position_ids, text_group_function(text_groups))
        elif position_ids is None:
            position_ids = torch.arange(length, device=device)[None] + cache.get_seq_length()
        rows = images.flatten(0, 1) if isinstance(images, torch.Tensor) else torch.cat(images)
        states, voco_hidden = self._split_rows(rows.to(device))
        tokens = np.argwhere(voco_mask)
        if batch_size == 1:
            # Assisted decoding of one sequence may propose `<voco>` tokens behind it, which are ordinary tokens
            tokens = tokens[: len(rows)]
        if len(tokens) != len(rows):
            raise ValueError(
                f"the input has {len(tokens)} <voco> tokens, but its images were compressed into {len(rows)}"
            )
        token_rows, token_columns = torch.from_numpy(tokens).to(device).unbind(-1)
        keys = self.rotate_keys(states[:, 0], position_ids.expand(batch_size, -1)[token_rows, token_columns])

        num_front = count_front_columns(voco_mask, attention_mask)
        num_left_out = self._count_left_out(num_front, length, mask, kwargs)
        front, among = split_tokens(tokens[:, 1] < num_front, device)
        places = token_rows[front], token_columns[front]
        kinds = keys, states[:, 1]
        injection = InjectionCache(
            cache,
            [place_tokens(kind[front], *places, (batch_size, num_front)) for kind in kinds],
            num_left_out,
            [kind[among] for kind in kinds],
            token_rows[among],
            token_columns[among] - num_front,
        )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds[:, num_left_out:],
            attention_mask=mask,
            position_ids=position_ids[:, num_left_out:],
            past_key_values=injection,
            use_cache=True,
            **kwargs,
        )
        hidden_states, all_hidden_states = outputs.last_hidden_state, outputs.hidden_states
        if num_left_out > 0:
            hidden_states = torch.nn.functional.pad(hidden_states, (0, 0, num_left_out, 0))
        if voco_hidden is not None:
            hidden_states = hidden_states.index_put((token_rows, token_columns), voco_hidden.to(hidden_states))
            if all_hidden_states is not None:
                all_hidden_states = (*all_hidden_states[:-1], hidden_states)
        return LlavaModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=cache if use_cache else None,
            hidden_states=all_hidden_states,
            attentions=outputs.attentions,
        )

    def _count_left_out(self, num_front: int, length: int, attention_mask: Any, arguments: dict[str, Any]) -> int:
        """Columns in front of all text that are not run: all of them, or none."""
        config = self.config.text_config
        records_layers = arguments.get("output_attentions", config.output_attentions) or arguments.get(
            "output_hidden_states", config.output_hidden_states
        )
        is_plain = attention_mask is None or tells_padding(attention_mask)
        are_few = num_front < MIN_FRONT_SHARE * (length - num_front)
        return 0 if records_layers or not is_plain or are_few else num_front


class VoCoLlamaForConditionalGeneration(
    VoCoLlamaGenerationMixin, VoCoLlamaPreTrainedModel, LlavaForConditionalGeneration
):
    """
    VoCo-LLaMA with a language modeling head. Its weights load into
    [`~transformers.LlavaForConditionalGeneration`] unchanged, and the other way round.

    Example:

    ```python
    >>> from transformers import AutoProcessor
    >>> from voco_llama_hf import VoCoLlamaForConditionalGeneration

    >>> model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    >>> processor = AutoProcessor.from_pretrained(checkpoint)
    >>> inputs = processor(images=image, text="<image>\nWhat is this?", num_voco_tokens=2, return_tensors="pt")
    >>> processor.batch_decode(model.generate(**inputs, max_new_tokens=20), skip_special_tokens=True)
    ```"""

    def __init__(self, config: VoCoLlamaConfig):
        # Not LlavaForConditionalGeneration's own: it would build a LlavaModel first
        super(LlavaForConditionalGeneration, self).__init__(config)
        text_config = self.config.text_config
        self.model = VoCoLlamaModel(config)
        self.lm_head = torch.nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:  # type: ignore[override]
        """See [`VoCoLlamaModel.get_image_features`]."""
        return self.model.get_image_features(*args, **kwargs)

    def get_voco_mask(self, *args, **kwargs) -> torch.Tensor:
        """See [`VoCoLlamaModel.get_voco_mask`]."""
        return self.model.get_voco_mask(*args, **kwargs)

    def compress(self, *args, **kwargs) -> VoCoCache:
        """See [`VoCoLlamaModel.compress`]."""
        return self.model.compress(*args, **kwargs)

    def fingerprint(self, exact: bool = True) -> Fingerprint:
        """See [`VoCoLlamaModel.fingerprint`]."""
        return self.model.fingerprint(exact)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        num_voco_tokens: int | list[int] | torch.Tensor | None = None,
        voco_cache: VoCoCache | None = None,
        attention_mode: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """
        See [`VoCoLlamaModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Labels of the short sequence, -100 where no loss is computed.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits of the last positions only, or of these; 0 computes all.

        Raises:
            ValueError: also if `labels` score the token right behind an image that comes from a `voco_cache`.
        """
        if labels is not None and voco_cache is not None:
            behind = self.model.get_voco_mask(input_ids, inputs_embeds)[:, :-1]
            if (labels[:, 1:][behind] != -100).any():
                raise ValueError(
                    "a voco_cache does not keep the hidden states that predict `<voco>` tokens and the token right "
                    "behind an image: set their labels to -100, or pass pixel_values"
                )
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            num_voco_tokens=num_voco_tokens,
            voco_cache=voco_cache,
            attention_mode=attention_mode,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


def rotate_keys(keys: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> torch.Tensor:
    """See [`VoCoLlamaModel.rotate_keys`]; `rotary_emb` is the rotary embedding of the text model."""
    positions = positions.to(keys.device)
    blocks = [
        _rotate_block(block, place, rotary_emb)
        for block, place in zip(keys.split(ROTATION_BLOCK_SIZE), positions.split(ROTATION_BLOCK_SIZE))
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _rotate_block(keys: torch.Tensor, positions: torch.Tensor, rotary_emb: torch.nn.Module) -> torch.Tensor:
    rotation = sys.modules[type(rotary_emb).__module__].apply_rotary_pos_emb
    by_head = keys.float().flatten(1, -2).transpose(0, 1)[None]
    cos, sin = rotary_emb(by_head, positions[None])
    # Scaled RoPE (YaRN) scales cos and sin; the keys have that factor already
    if rotary_emb.attention_scaling != 1:
        cos, sin = cos / rotary_emb.attention_scaling, sin / rotary_emb.attention_scaling
    # Queries and keys are rotated alike, so that keys can take the place of both
    rotated = torch.cat(rotation(*by_head.tensor_split(2, dim=1), cos, sin), dim=1)
    return rotated[0].transpose(0, 1).reshape(keys.shape).to(keys.dtype)


def tells_padding(attention_mask: Any) -> bool:
    """Whether a mask is one of tokens, and not a finished one of who attends to whom."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def count_front_columns(voco_mask: np.ndarray, attention_mask: Any) -> int:
    """
    Columns that hold nothing but images, or padding, in every row, in front of all others.

    Args:
        voco_mask (`np.ndarray` of shape `(batch_size, sequence_length)`): True at `<voco>` tokens.
        attention_mask (`torch.Tensor`, *optional*): Padding is known if [`tells_padding`].
    """
    is_text = ~voco_mask
    if tells_padding(attention_mask):
        is_text &= attention_mask[:, -voco_mask.shape[1] :].bool().cpu().numpy()
    has_text: Any = is_text.any(axis=0)
    # At least one column is run, for the last hidden states
    has_text[-1] = True
    return int(has_text.argmax())


def split_tokens(is_front: np.ndarray, device: torch.device) -> tuple[Any, Any]:
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


VoCoLlamaModel.register_for_auto_class("AutoModel")
VoCoLlamaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VoCoLlamaForConditionalGeneration", "VoCoLlamaModel", "VoCoLlamaPreTrainedModel"]
