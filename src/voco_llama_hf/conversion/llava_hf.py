"""Checkpoints of llava-hf: the layout of transformers' `LlavaForConditionalGeneration`, old and new."""

from pathlib import Path
from typing import Any, cast

from transformers import LlavaConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .checkpoint import Checkpoint
from .source_files import as_value_error, read_weights, rename


# Checkpoints of before transformers 4.52, and those that are still saved in that layout
NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^(?=vision_tower\.|multi_modal_projector\.)": "model.",
}


def read_llava_hf_checkpoint(source: Path, config: dict[str, Any], vision_tower: str | Path | None) -> Checkpoint:
    """Reads the configuration and maps the weights. Of `vision_tower` only the image processor is taken."""
    if "text_config" not in config:
        raise ValueError(
            f"{source} is a llava checkpoint of the original layout, without text_config; "
            "a llava-hf checkpoint or a VoCo-LLaMA of the authors' code (model_type llava_llama) was expected"
        )
    with as_value_error(f"{source / CONFIG_NAME} does not describe a Llava"):
        llava = LlavaConfig.from_dict(config)
    return Checkpoint(
        source=source,
        source_format=llava.model_type,
        tokenizer_config=llava,
        text_config=cast(PreTrainedConfig, llava.text_config),
        vision_config=cast(PreTrainedConfig, llava.vision_config),
        llava_arguments={
            "vision_feature_layer": llava.vision_feature_layer,
            "vision_feature_select_strategy": llava.vision_feature_select_strategy,
            "projector_hidden_act": llava.projector_hidden_act,
            "multimodal_projector_bias": llava.multimodal_projector_bias,
            "image_seq_length": llava.image_seq_length,
            "tie_word_embeddings": llava.tie_word_embeddings,
        },
        state_dict=rename(read_weights(source), NAMES),
        vision_tower=f"weights and configuration from {source}",
        image_processor_sources=[vision_tower or source],
        has_voco_token=False,
    )
