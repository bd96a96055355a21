"""What every source format is read into."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

import torch
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME


EMBEDDING = "model.language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
VISION_TOWER = "model.vision_tower."


class LlavaArguments(TypedDict):
    """What [`VoCoLlamaConfig`] takes beside its two models and `<voco>`."""

    vision_feature_layer: int | list[int]
    vision_feature_select_strategy: Literal["default", "full"]
    projector_hidden_act: str
    multimodal_projector_bias: bool
    image_seq_length: int
    tie_word_embeddings: bool
    num_voco_tokens: NotRequired[int]
    base_model_type: NotRequired[Literal["llava", "llava_next", "llava_onevision"]]
    image_grid_pinpoints: NotRequired[list[list[int]]]
    vision_aspect_ratio: NotRequired[str]


@dataclass
class Checkpoint:
    """
    What a source holds, under this package's names, and what a converter notices on the way.

    Args:
        source (`Path`):
            Its folder.
        source_format (`str`):
            Its model type.
        tokenizer_config (`PreTrainedConfig`):
            A configuration that transformers finds the class of its tokenizer by.
        text_config, vision_config (`PreTrainedConfig`):
            The language model and the vision tower.
        llava_arguments (`dict`):
            What else of a Llava's configuration is the model's.
        state_dict (`dict[str, torch.Tensor]`):
            Its weights, memory-mapped, under the names of [`VoCoLlamaForConditionalGeneration`].
        vision_tower (`str`):
            Where the weights and the configuration of the vision tower came from.
        image_processor_sources (`list`):
            Folders and hub ids that may have its image processor; the first that has one is taken.
        has_voco_token (`bool`):
            Whether it was trained with a `<voco>`; otherwise it is given one.
        pad_to_square (`bool`, *optional*, defaults to `False`):
            Whether images are padded to squares first.
        chat_template (`str`, *optional*):
            The template for a tokenizer without one.
        warnings (`list[str]`, *optional*):
            What the user should look at.
    """

    source: Path
    source_format: str
    tokenizer_config: PreTrainedConfig
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig
    llava_arguments: LlavaArguments
    state_dict: dict[str, torch.Tensor]
    vision_tower: str
    image_processor_sources: list[str | Path]
    has_voco_token: bool
    pad_to_square: bool = False
    chat_template: str | None = None
    warnings: list[str] = field(default_factory=list)


def check_embedding(checkpoint: Checkpoint) -> None:
    """Raises unless there is one float embedding for every token of the vocabulary."""
    embedding = checkpoint.state_dict.get(EMBEDDING)
    if embedding is None:
        raise ValueError(f"{checkpoint.source} has no token embeddings; {EMBEDDING} was expected among its weights")
    if not embedding.is_floating_point():
        raise ValueError(f"{checkpoint.source} holds {embedding.dtype} weights; float weights were expected")
    if embedding.shape[0] != checkpoint.text_config.vocab_size:
        raise ValueError(
            f"{checkpoint.source} has {embedding.shape[0]} token embeddings; "
            f"{checkpoint.text_config.vocab_size} were expected (vocab_size of {CONFIG_NAME})"
        )
