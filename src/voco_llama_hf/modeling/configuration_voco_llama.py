"""VoCo-LLaMA model configuration."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import LlavaConfig


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

    Raises:
        ValueError: if `num_voco_tokens` is below 1.

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

    def __post_init__(self, **kwargs):
        if "image_token_id" in kwargs:
            self.voco_token_id = kwargs.pop("image_token_id")
        if self.vision_prefix_token_ids is None:
            self.vision_prefix_token_ids = [1]
        if self.vision_suffix_token_ids is None:
            self.vision_suffix_token_ids = [13]
        super().__post_init__(**kwargs)
        # Written in full whichever class is saved, so that every Auto class finds its code on the Hub
        self.auto_map = {
            "AutoConfig": "configuration_voco_llama.VoCoLlamaConfig",
            "AutoModel": "modeling_voco_llama.VoCoLlamaModel",
            "AutoModelForImageTextToText": "modeling_voco_llama.VoCoLlamaForConditionalGeneration",
            "AutoProcessor": "processing_voco_llama.VoCoLlamaProcessor",
        }

    def validate_num_voco_tokens(self):
        """Part of `@strict`-powered validation."""
        if self.num_voco_tokens < 1:
            raise ValueError(f"num_voco_tokens must be at least 1, got {self.num_voco_tokens}")


VoCoLlamaConfig.register_for_auto_class()

__all__ = ["VoCoLlamaConfig"]
