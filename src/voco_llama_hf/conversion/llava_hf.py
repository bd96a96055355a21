"""Checkpoints of llava-hf: the layout of transformers' LLaVA, LLaVA-NeXT and LLaVA-OneVision, old and new."""

from pathlib import Path
from typing import Any, cast

from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .checkpoint import Checkpoint, LlavaArguments
from .source_files import as_value_error, choose, read_weights, rename


# Checkpoints of before transformers 4.52, and those that are still saved in that layout
NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^(?=vision_tower\.|multi_modal_projector\.|image_newline$)": "model.",
}


CONFIGS: dict[str, Any] = {
    "llava": LlavaConfig,
    "llava_next": LlavaNextConfig,
    "llava_onevision": LlavaOnevisionConfig,
}


def read_llava_hf_checkpoint(source: Path, config: dict[str, Any], vision_tower: str | Path | None) -> Checkpoint:
    """Reads the configuration and maps the weights. Of `vision_tower` only the image processor is taken."""
    model_type = config["model_type"]
    if "text_config" not in config:
        raise ValueError(
            f"{source} is a {model_type} checkpoint of the original layout, without text_config; "
            "a llava-hf checkpoint or a VoCo-LLaMA of the authors' code (model_type llava_llama) was expected"
        )
    # Older versions of transformers wrote it down, and had no other way
    choose(config, "use_image_newline_parameter", {True: True}, True)
    config_class = CONFIGS[model_type]
    with as_value_error(f"{source / CONFIG_NAME} does not describe a {config_class.__name__.removesuffix('Config')}"):
        llava: Any = config_class.from_dict(config)
    return Checkpoint(
        source=source,
        source_format=llava.model_type,
        tokenizer_config=llava,
        text_config=cast(PreTrainedConfig, llava.text_config),
        vision_config=cast(PreTrainedConfig, llava.vision_config),
        llava_arguments=_arguments(llava),
        state_dict=rename(read_weights(source), NAMES),
        vision_tower=f"weights and configuration from {source}",
        image_processor_sources=[vision_tower or source],
        has_voco_token=False,
    )


def _arguments(llava: Any) -> LlavaArguments:  # a configuration of one of `CONFIGS`, whose parts are of any class
    arguments: LlavaArguments = {
        "vision_feature_layer": llava.vision_feature_layer,
        "vision_feature_select_strategy": llava.vision_feature_select_strategy,
        "projector_hidden_act": llava.projector_hidden_act,
        "multimodal_projector_bias": llava.multimodal_projector_bias,
        "image_seq_length": (llava.vision_config.image_size // llava.vision_config.patch_size) ** 2,
        "tie_word_embeddings": llava.tie_word_embeddings,
    }
    if llava.model_type != "llava_onevision":
        arguments["image_seq_length"] = llava.image_seq_length
    if llava.model_type != "llava":
        arguments |= {"base_model_type": llava.model_type, "image_grid_pinpoints": llava.image_grid_pinpoints}
    if llava.model_type == "llava_onevision":
        arguments["vision_aspect_ratio"] = llava.vision_aspect_ratio
    return arguments
