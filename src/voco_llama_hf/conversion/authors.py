"""Checkpoints of the authors' code: the layout of the original LLaVA, trained with a `<voco>`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .checkpoint import VISION_TOWER, Checkpoint
from .clip import load_clip_config, load_clip_weights
from .source_files import as_value_error, choose, read_weights, rename


NAMES = {
    r"^model\.vision_tower\.vision_tower\.": VISION_TOWER,
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "model.language_model.",
}

# The prompt the authors train on: the image first, then the system prompt and the turns of Vicuna v1
CHAT_TEMPLATE = """\
{%- for message in messages if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] in ('image', 'video') -%}
        {{ '<' + part['type'] + '>\\n' }}
    {%- endfor -%}
{%- endfor -%}
{%- if messages[0]['role'] != 'system' -%}
    {{ 'A chat between a curious user and an artificial intelligence assistant of the image. ' }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set text = message['content'] -%}
    {%- else -%}
        {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
    {%- endif -%}
    {%- if message['role'] == 'system' -%}
        {{ text + ' ' }}
    {%- elif message['role'] == 'user' -%}
        {{ 'USER: ' + text + ' ' }}
    {%- else -%}
        {{ 'ASSISTANT: ' }}{%- generation -%}{{ text + '</s>' }}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ 'ASSISTANT:' }}
{%- endif -%}
"""


def read_authors_checkpoint(source: Path, config: dict[str, Any], vision_tower: str | Path | None) -> Checkpoint:
    """Reads the configuration and maps the weights. They hold the vision tower only if it was trained."""
    activation = choose(config, "mm_projector_type", {"mlp2x_gelu": "gelu"})
    select_cls = choose(config, "mm_vision_select_feature", {"patch": False, "cls_patch": True}, "patch")
    pad_to_square = choose(config, "image_aspect_ratio", {None: False, "square": False, "pad": True})
    choose(config, "mm_use_im_start_end", {False: False}, False)
    feature_layer = config.get("mm_vision_select_layer")
    if not isinstance(feature_layer, int):
        raise ValueError(f"{CONFIG_NAME} has mm_vision_select_layer {feature_layer!r}; an integer was expected")
    text_config = _llama_config(source, config)
    tower = vision_tower or config.get("mm_vision_tower")
    if tower is None:
        raise ValueError(f"{source} does not name its vision tower (mm_vision_tower): pass vision_tower")
    vision_config = load_clip_config(tower)
    state_dict = rename(read_weights(source), NAMES)
    weights_from: str | Path = source
    if not any(name.startswith(VISION_TOWER) for name in state_dict):
        state_dict |= load_clip_weights(tower, vision_config)
        weights_from = tower
    sizes = vision_config.to_dict()
    return Checkpoint(
        source=source,
        source_format=config["model_type"],
        tokenizer_config=text_config,
        text_config=text_config,
        vision_config=vision_config,
        llava_arguments={
            "vision_feature_layer": feature_layer,
            "vision_feature_select_strategy": "full" if select_cls else "default",
            "projector_hidden_act": activation,
            "multimodal_projector_bias": True,
            "image_seq_length": (sizes["image_size"] // sizes["patch_size"]) ** 2 + select_cls,
            "tie_word_embeddings": text_config.tie_word_embeddings,
        },
        state_dict=state_dict,
        vision_tower=f"weights from {weights_from}, configuration from {tower}",
        image_processor_sources=[tower, source],
        has_voco_token=True,
        pad_to_square=pad_to_square,
        chat_template=CHAT_TEMPLATE,
    )


def _llama_config(source: Path, config: dict[str, Any]) -> LlamaConfig:
    """The language model of an authors' checkpoint, whose fields keep their names."""
    names = {f.name for f in fields(LlamaConfig)} - {f.name for f in fields(PreTrainedConfig)}
    names |= {"rope_theta", "rope_scaling"}
    with as_value_error(f"{source / CONFIG_NAME} does not describe a Llama"):
        return LlamaConfig(**{name: value for name, value in config.items() if name in names})
