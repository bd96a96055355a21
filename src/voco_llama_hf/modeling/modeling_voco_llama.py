"""PyTorch VoCo-LLaMA: a LLaVA whose language model compresses every image into a few VoCo tokens.

Two ways to compute, one result. `single_pass_voco_llama.py`: the long sequence once, under the VoCo attention mask.
`two_stages_voco_llama.py`: every image on its own under plain causal attention, then the short sequence with the keys
and values of the VoCo tokens injected into its cache.
"""

from .compat_voco_llama import CACHE, SELECTS_HIDDEN_STATES


# isort: split
from typing import Any

import torch
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, LlavaPreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils.generic import can_return_tuple

from .attention_voco_llama import MASKABLE_ATTENTION, takes_masks
from .cache_voco_llama import VoCoCache
from .compression_voco_llama import VoCoLlamaCompressionMixin, check_image_indices
from .configuration_voco_llama import VoCoLlamaConfig, check_text_config
from .fingerprint_voco_llama import Fingerprint, FingerprintMemo
from .generation_voco_llama import VoCoLlamaGenerationMixin, num_seen_tokens
from .injection_voco_llama import CompressedImages
from .llava_next_voco_llama import LlavaNextImages
from .llava_onevision_voco_llama import LlavaOnevisionImages
from .outputs_voco_llama import VoCoLlamaCausalLMOutputWithPast, VoCoLlamaModelOutputWithPast
from .runtime_voco_llama import execution_device
from .single_pass_voco_llama import run_single_pass
from .tiles_voco_llama import TiledImages, init_newline
from .two_stages_voco_llama import run_second_stage


ATTENTION_MODES = ("voco", "causal", "uncompressed")
# Arguments of LLaVA that have no meaning here, and must not vanish among those of the text model
UNSUPPORTED = {
    "mm_encoder_outputs": "pass compressed images as a voco_cache",
}

# Checkpoints of the first LLaVA classes name their weights in an older way
for name, llava_name in (
    ("voco_llama", "llava_next"),
    *((name, "LlavaModel") for name in ("VoCoLlamaModel", "VoCoLlamaNextModel", "VoCoLlamaOnevisionModel")),
):
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping(llava_name), overwrite=True)


class VoCoLlamaPreTrainedModel(LlavaPreTrainedModel):
    config: Any  # a VoCoLlamaConfig, whose parts are of whatever classes they name
    config_class = VoCoLlamaConfig

    def save_pretrained(self, *args, **kwargs):
        """
        See [`~transformers.PreTrainedModel.save_pretrained`]. Weights keep the names of the model's parameters: a
        trainer that resumes would not find them by the older ones of LLaVA.
        """
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, TiledImages):
            init_newline(module)


class VoCoLlamaModel(VoCoLlamaCompressionMixin, VoCoLlamaPreTrainedModel, LlavaModel):
    """
    The VoCo-LLaMA model without a language modeling head. Submodules and parameter names are those of
    [`~transformers.LlavaModel`]; one whose `config.base_model_type` is another is of a subclass of its own.

    Raises:
        ValueError: if compressed images cannot be moved to other positions with the text model of `config`.
    """

    def __new__(cls, config: VoCoLlamaConfig | None = None, *args, **kwargs):
        # Copies are made without a configuration, and of the class that they are of
        chosen = cls if config is None or cls is not VoCoLlamaModel else MODELS[config.base_model_type]
        return super().__new__(chosen)

    def __init__(self, config: VoCoLlamaConfig):
        check_text_config(config.text_config)  # type: ignore[arg-type]
        super().__init__(config)
        self._fingerprint = FingerprintMemo()
        self._rotation_is_checked = False

    def get_vision_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor | list[torch.Tensor]:
        """
        Vision tokens in the embedding space of the text model: what LLaVA puts into the sequence.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, 3, height, width)`):
                Preprocessed images.
            image_sizes (`torch.LongTensor`, *optional*):
                For models that divide images into tiles, see [`TiledImages`].
            options:
                `vision_feature_layer` and `vision_feature_select_strategy`, instead of what the configuration says.

        Returns:
            `torch.Tensor` of shape `(num_images, V, hidden_size)`; a list of `(V, hidden_size)` where images have
            numbers of their own.
        """
        if image_sizes is not None:
            raise ValueError("VoCo-LLaMA does not take image_sizes: this model's images are squares of one size")
        return self.get_tile_features(pixel_values, **options)

    def get_tile_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> torch.Tensor:
        """The same of squares of one size: `(num_images, V, hidden_size)`."""
        # As LlavaModel.get_image_features does, whose list of images would fix their number in an exported graph
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if strategy not in ("default", "full"):
            raise ValueError(f'vision_feature_select_strategy must be "default" or "full", got {strategy!r}')
        pixel_values = pixel_values.to(execution_device(self.vision_tower))
        wanted = layers if SELECTS_HIDDEN_STATES else True
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=wanted, return_dict=True).hidden_states
        chosen = [hidden_states[layer] for layer in layers]
        if strategy == "default":
            chosen = [states[:, 1:] for states in chosen]
        return self.multi_modal_projector(torch.cat(chosen, dim=-1))

    def embed_ids(self, token_ids: list[int]) -> torch.Tensor:
        """Embeddings `(len(token_ids), hidden_size)`."""
        embedding = self.get_input_embeddings()
        ids = torch.tensor([token_ids], dtype=torch.long, device=execution_device(embedding))
        # As a batch of one sequence, which is what hooks and adapters of embeddings expect
        return embedding(ids)[0]

    def get_voco_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """`(batch_size, sequence_length)` mask of the `<voco>` tokens of a sequence given as ids or as embeddings."""
        if input_ids is not None:
            return input_ids == self.config.voco_token_id
        voco_embed = self.embed_ids([self.config.voco_token_id])[0]
        return torch.eq(inputs_embeds, voco_embed.to(inputs_embeds)).all(-1)  # type: ignore[arg-type]

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
        compressed_images: CompressedImages | None = None,
        attention_mode: str | None = None,
        text_groups: torch.LongTensor | None = None,
        two_stages: bool | None = None,
        use_cache: bool | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        cache: Cache | None = None,
        image_sizes: torch.Tensor | None = None,
        image_indices: list[int] | torch.LongTensor | None = None,
        **kwargs,
    ) -> VoCoLlamaModelOutputWithPast:
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
            cache ([`~transformers.Cache`], *optional*):
                The same as `past_key_values`, by its name from transformers 5.24 on.
            compressed_images ([`CompressedImages`], *optional*):
                The images compressed already and where they stand in the whole sequence, as `generate` hands them on.
            vision_feature_layer, vision_feature_select_strategy (*optional*):
                See [`~transformers.LlavaConfig`], which says them by default.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)`, *optional*):
                Height and width of each image before it was divided into tiles, as the processor returns them.
                `pixel_values` then has the shape `(num_images, num_tiles, 3, height, width)`, see [`TiledImages`].
            image_indices (`list[int]` or `torch.LongTensor` of shape `(num_places,)`, *optional*):
                For images that stand in several rows, or with several numbers of VoCo tokens: which of `pixel_values`
                stands in each place of the batch. `num_voco_tokens` are those of the places then, and in two stages an
                image is compressed once for all of its own.

        Returns:
            [`VoCoLlamaModelOutputWithPast`], aligned with the short sequence.
            `attentions` of a single pass are those of the long sequence.

        Raises:
            ValueError: if images, `<voco>` tokens and `num_voco_tokens` do not fit, or the modes cannot be combined.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        refuse_unsupported(kwargs)
        cache = past_key_values if cache is None else cache
        images_given = [images for images in (pixel_values, voco_cache, compressed_images) if images is not None]
        mode = self._check_mode(attention_mode, images_given, pixel_values, cache)
        if use_cache is None:
            use_cache = self.config.text_config.use_cache
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_indices is not None and pixel_values is None:
            raise ValueError("image_indices are those of pixel_values: pass these too")
        if text_groups is not None and not (images_given and cache is None and takes_masks(self.config.text_config)):
            raise ValueError(
                "text_groups needs images, no past_key_values, and an attention that takes masks "
                f"({', '.join(MASKABLE_ATTENTION)})"
            )
        two_stages = self._runs_in_two_stages(two_stages, mode, use_cache, cache)
        language_inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        vision_options: dict[str, Any] = {
            "vision_feature_layer": vision_feature_layer,
            "vision_feature_select_strategy": vision_feature_select_strategy,
            "image_sizes": image_sizes,
        }

        if pixel_values is not None and not two_stages:
            voco_mask = self.get_voco_mask(input_ids, inputs_embeds)
            vision = self.get_vision_features(pixel_values, **vision_options)
            if image_indices is not None:
                places = check_image_indices(image_indices, len(vision))
                vision = vision[places] if isinstance(vision, torch.Tensor) else [vision[index] for index in places]
            return run_single_pass(
                self, inputs_embeds, vision, voco_mask, num_voco_tokens, mode, text_groups, **language_inputs
            )

        (batch_size, length), start = inputs_embeds.shape[:2], num_seen_tokens(cache) if images_given else 0
        if pixel_values is not None or voco_cache is not None:
            # Read where the host is: one wait for the device instead of one for every number
            on_host = self.get_voco_mask(input_ids, inputs_embeds).cpu().numpy()
            compressed_images = self.get_compressed_images(
                pixel_values, voco_cache, num_voco_tokens, on_host, start, image_indices, **vision_options
            )
        if compressed_images is not None and compressed_images.stand_in(start, length):
            images = compressed_images.window(start, length, batch_size)
            return run_second_stage(self, inputs_embeds, images, cache, use_cache, text_groups, **language_inputs)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds, use_cache=use_cache, **{CACHE: cache}, **language_inputs
        )
        return VoCoLlamaModelOutputWithPast(**outputs)

    def _check_mode(
        self,
        attention_mode: str | None,
        images_given: list,
        pixel_values: torch.Tensor | None,
        cache: Cache | None,
    ) -> str:
        mode = self.config.attention_mode if attention_mode is None else attention_mode
        if mode not in ATTENTION_MODES:
            raise ValueError(f"attention_mode must be one of {', '.join(ATTENTION_MODES)}, got {mode!r}")
        if len(images_given) > 1:
            raise ValueError("pass the images once: as pixel_values, as a voco_cache or as compressed_images")
        if mode != "voco" and (cache is not None or (images_given and pixel_values is None)):
            raise ValueError(
                f'attention_mode="{mode}" needs the pixels of all images and no cache; to generate uncompressed, load '
                "these weights into LlavaForConditionalGeneration"
            )
        return mode

    def _runs_in_two_stages(self, two_stages: bool | None, mode: str, use_cache: bool, cache: Cache | None) -> bool:
        if mode != "voco":
            return False
        can_mask = takes_masks(self.config.text_config)
        # Gradient checkpointing switches caches off, and with them the injection
        if self.training and self.language_model.gradient_checkpointing and cache is None:
            if two_stages:
                raise ValueError("gradient checkpointing needs the single pass: two_stages cannot be True")
            if not can_mask:
                raise ValueError(
                    "gradient checkpointing needs the single pass, whose mask "
                    f"{self.config.text_config._attn_implementation} cannot apply: use {', '.join(MASKABLE_ATTENTION)}"
                )
            return False
        needs_stages = use_cache or cache is not None or not can_mask
        if two_stages is False and needs_stages:
            raise ValueError("two_stages=False needs use_cache=False and an attention that takes masks")
        return needs_stages if two_stages is None else two_stages


class VoCoLlamaNextModel(LlavaNextImages, VoCoLlamaModel):
    """[`VoCoLlamaModel`] with the vision side of [`~transformers.LlavaNextModel`]."""


class VoCoLlamaOnevisionModel(LlavaOnevisionImages, VoCoLlamaModel):
    """[`VoCoLlamaModel`] with the vision side of [`~transformers.LlavaOnevisionModel`]."""


# By `base_model_type`
MODELS = {"llava": VoCoLlamaModel, "llava_next": VoCoLlamaNextModel, "llava_onevision": VoCoLlamaOnevisionModel}


class VoCoLlamaForConditionalGeneration(
    VoCoLlamaGenerationMixin, VoCoLlamaPreTrainedModel, LlavaForConditionalGeneration
):
    r"""
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

    def get_compressed_images(self, *args, **kwargs) -> CompressedImages:
        """See [`VoCoLlamaModel.get_compressed_images`]."""
        return self.model.get_compressed_images(*args, **kwargs)

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
        compressed_images: CompressedImages | None = None,
        attention_mode: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        cache: Cache | None = None,
        image_sizes: torch.Tensor | None = None,
        **kwargs,
    ) -> VoCoLlamaCausalLMOutputWithPast:
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
            inputs_embeds=inputs_embeds,
            num_voco_tokens=num_voco_tokens,
            voco_cache=voco_cache,
            compressed_images=compressed_images,
            attention_mode=attention_mode,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            cache=past_key_values if cache is None else cache,
            image_sizes=image_sizes,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return VoCoLlamaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )


def refuse_unsupported(arguments: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: if there is an argument of LLaVA among these that has no meaning here.
    """
    for name, reason in UNSUPPORTED.items():
        if arguments.pop(name, None) is not None:
            raise ValueError(f"VoCo-LLaMA does not take {name}: {reason}")


VoCoLlamaModel.register_for_auto_class("AutoModel")
VoCoLlamaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["VoCoLlamaForConditionalGeneration", "VoCoLlamaModel", "VoCoLlamaPreTrainedModel"]
