"""Models to measure: the shapes of well-known checkpoints. Random weights cost what trained ones do."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from .. import EMBEDDED_CHECKPOINT
from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration


CLIP_LARGE_336: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
    "image_size": 336,
    "patch_size": 14,
}


def llava_1_5_7b() -> VoCoLlamaConfig:
    """Vicuna-7B and CLIP ViT-L/14 at 336 pixels: the model of the paper."""
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    return VoCoLlamaConfig(text_config=text, vision_config=CLIPVisionConfig(**CLIP_LARGE_336))


def llava_next_7b() -> VoCoLlamaConfig:
    """LLaVA-NeXT (LLaVA-1.6) with Vicuna-7B: the same model, that reads an image in up to five tiles."""
    config = llava_1_5_7b()
    return VoCoLlamaConfig(
        text_config=config.text_config, vision_config=config.vision_config, base_model_type="llava_next"
    )


def llama_3_8b() -> VoCoLlamaConfig:
    """Llama 3 8B, whose queries share their keys and values in groups of four, and the same vision tower."""
    text = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128320,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=128000,
        eos_token_id=128001,
    )
    return VoCoLlamaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(**CLIP_LARGE_336),
        voco_token_id=128256,
        vision_prefix_token_ids=[128000],
        vision_suffix_token_ids=[198],
    )


def tiny() -> VoCoLlamaConfig:
    """The shape of the checkpoint that ships with the package."""
    return VoCoLlamaConfig.from_pretrained(EMBEDDED_CHECKPOINT)


PRESETS: dict[str, Callable[[], VoCoLlamaConfig]] = {
    "llava-1.5-7b": llava_1_5_7b,
    "llava-next-7b": llava_next_7b,
    "llama-3-8b": llama_3_8b,
    "tiny": tiny,
}


def build_model(
    config: VoCoLlamaConfig, device: str | torch.device, dtype: torch.dtype
) -> VoCoLlamaForConditionalGeneration:
    """A model with random weights; on the device `"meta"` it has shapes only and takes no memory."""
    torch.manual_seed(0)
    with torch.device(device):
        return VoCoLlamaForConditionalGeneration._from_config(config, dtype=dtype).eval()
