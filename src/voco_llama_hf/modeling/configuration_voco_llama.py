"""VoCo-LLaMA model configuration."""

from .compat_voco_llama import VERSION  # noqa: F401


# isort: split
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedConfig

from .pipeline_voco_llama import register_pipeline


if TYPE_CHECKING:
    # A transformers that is too old to load this copies only what is named here, and says which version is needed
    from .images_voco_llama import load_images  # noqa: F401


LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Of those whose vision side divides images into tiles
BASE_CONFIGS = {"llava_next": LlavaNextConfig, "llava_onevision": LlavaOnevisionConfig}


@strict
class VoCoLlamaConfig(LlavaConfig):
    r"""
    Configuration of a VoCo-LLaMA model: a LLaVA whose language model compresses every image into a few VoCo tokens
    (Ye et al., *VoCo-LLaMA: Towards Vision Compression with Large Language Models*, CVPR 2025).

    It takes every argument of [`~transformers.LlavaConfig`], and:

    Args:
        voco_token_id (`int`, *optional*, defaults to 32000):
            Id of the `<voco>` token. All VoCo tokens share it, so one model answers at any number of VoCo tokens.
            `image_token_id` and `image_token_index` are aliases.
        num_voco_tokens (`int`, *optional*, defaults to 1):
            VoCo tokens an image is compressed into when a call does not say.
        vision_prefix_token_ids (`list[int]`, *optional*, defaults to `[1]`):
            Ids in front of the vision tokens of every image; the authors' format has the BOS token here.
        vision_suffix_token_ids (`list[int]`, *optional*, defaults to `[13]`):
            Ids between the vision tokens and the VoCo tokens; the authors' format has a newline here.
        attention_mode (`str`, *optional*, defaults to `"voco"`):
            What text attends to: `"voco"` (VoCo tokens and text, paper Eq. 3), `"causal"` (everything before it, the
            upper bound of Table 1) or `"uncompressed"` (the vision tokens alone, as in LLaVA; the teacher of Eq. 5).
        base_model_type (`str`, *optional*, defaults to `"llava"`):
            Model of transformers whose vision side this is: `"llava"`, `"llava_next"` or `"llava_onevision"`.
        image_grid_pinpoints (`list[list[int]]`, *optional*):
            Heights and widths that images are divided into tiles at, as of [`~transformers.LlavaNextConfig`] and
            [`~transformers.LlavaOnevisionConfig`], whose own is the default. Not for `"llava"`.
        vision_aspect_ratio (`str`, *optional*):
            As of [`~transformers.LlavaOnevisionConfig`], `"anyres_max_9"` by default. For `"llava_onevision"` only.

    Raises:
        ValueError: if `num_voco_tokens` is below 1, or `image_grid_pinpoints` does not fit the vision tower.

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from voco_llama_hf import VoCoLlamaConfig

    >>> config = VoCoLlamaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig(vocab_size=32001))
    ```"""

    model_type = "voco_llama"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "voco_token_id", "image_token_index": "voco_token_id"}

    voco_token_id: int = 32000
    num_voco_tokens: int = 1
    vision_prefix_token_ids: list[int] | None = None
    vision_suffix_token_ids: list[int] | None = None
    attention_mode: Literal["voco", "causal", "uncompressed"] = "voco"
    base_model_type: Literal["llava", "llava_next", "llava_onevision"] = "llava"
    image_grid_pinpoints: list | None = None
    vision_aspect_ratio: str | None = None

    def __post_init__(self, **kwargs):
        if "image_token_id" in kwargs:
            self.voco_token_id = kwargs.pop("image_token_id")
        if self.vision_prefix_token_ids is None:
            self.vision_prefix_token_ids = [1]
        if self.vision_suffix_token_ids is None:
            self.vision_suffix_token_ids = [13]
        if self.image_grid_pinpoints is None and self.base_model_type in BASE_CONFIGS:
            self.image_grid_pinpoints = BASE_CONFIGS[self.base_model_type]().image_grid_pinpoints
        if self.vision_aspect_ratio is None and self.base_model_type == "llava_onevision":
            self.vision_aspect_ratio = LlavaOnevisionConfig().vision_aspect_ratio
        super().__post_init__(**kwargs)
        # Written in full whichever class is saved, so that every Auto class finds its code on the Hub
        self.auto_map = {
            "AutoConfig": "configuration_voco_llama.VoCoLlamaConfig",
            "AutoModel": "modeling_voco_llama.VoCoLlamaModel",
            "AutoModelForImageTextToText": "modeling_voco_llama.VoCoLlamaForConditionalGeneration",
            "AutoModelForMultimodalLM": "modeling_voco_llama.VoCoLlamaForConditionalGeneration",
            "AutoProcessor": "processing_voco_llama.VoCoLlamaProcessor",
        }

    def validate_num_voco_tokens(self):
        """Part of `@strict`-powered validation."""
        if self.num_voco_tokens < 1:
            raise ValueError(f"num_voco_tokens must be at least 1, got {self.num_voco_tokens}")

    def validate_image_grid_pinpoints(self):
        """Part of `@strict`-powered validation."""
        grid, size = self.image_grid_pinpoints, getattr(self.vision_config, "image_size", None)
        if self.base_model_type not in BASE_CONFIGS:
            if grid is not None or self.vision_aspect_ratio is not None:
                raise ValueError(
                    f'base_model_type="{self.base_model_type}" divides no images: image_grid_pinpoints and '
                    "vision_aspect_ratio must be None"
                )
        elif not grid or any(not is_resolution(pair) or pair[0] % size or pair[1] % size for pair in grid):
            raise ValueError(
                f"image_grid_pinpoints must be a list of heights and widths that are multiples of {size}, the "
                f"image_size of the vision tower, got {grid}"
            )


def is_resolution(pair: object) -> bool:
    """Whether this is a height and a width."""
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)


def key_value_shape(text_config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key-value heads and head size of a text model."""
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    return text_config.num_hidden_layers, text_config.num_key_value_heads, head_dim


def cache_bytes(config: "VoCoLlamaConfig", num_tokens: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of a number of tokens."""
    layers, heads, head_dim = key_value_shape(config.text_config)  # type: ignore[arg-type]
    return 2 * layers * heads * head_dim * num_tokens * dtype.itemsize


def layer_types(text_config: PreTrainedConfig) -> set[str]:
    """Kinds of attention layers of a text model; one that does not tell them apart has one kind."""
    kinds = getattr(text_config, "layer_types", None)
    if kinds is None:
        is_sliding = getattr(text_config, "sliding_window", None) is not None
        kinds = ["sliding_attention" if is_sliding else "full_attention"]
    return set(kinds)


def sliding_window(text_config: PreTrainedConfig) -> int | None:
    """Window of the sliding attention layers of a text model, if it has any."""
    return text_config.sliding_window if "sliding_attention" in layer_types(text_config) else None


def check_text_config(text_config: PreTrainedConfig) -> None:
    """
    Checks that the keys of a compressed image can be moved to other positions.

    Raises:
        ValueError: if the text model has no rotary embedding, or one that depends on the length of the sequence, or
            layers without keys and values.
    """
    rope = getattr(text_config, "rope_parameters", None)
    if rope is None:
        raise ValueError(
            "VoCo-LLaMA needs a text model with rotary position embeddings to move compressed images, "
            f"{text_config.model_type} has none"
        )
    if "rope_type" not in rope:
        raise ValueError(f"VoCo-LLaMA needs one rotary embedding for all layers, {text_config.model_type} has several")
    if rope["rope_type"] in LENGTH_DEPENDENT_ROPE:
        raise ValueError(
            f"rope_type={rope['rope_type']!r} changes with the length of the sequence, so compressed images could not "
            "be reused: use a static one (default, linear, llama3, yarn)"
        )
    if unknown := layer_types(text_config) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"VoCo-LLaMA needs attention layers only, {text_config.model_type} has {sorted(unknown)}")


VoCoLlamaConfig.register_for_auto_class()
register_pipeline()

__all__ = ["VoCoLlamaConfig"]
