"""The converted model and processor, built from a checkpoint that was read, and written."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    LlavaImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from ..files import new_folder
from ..modeling.configuration_voco_llama import VoCoLlamaConfig
from ..modeling.modeling_voco_llama import VoCoLlamaForConditionalGeneration
from ..modeling.processing_voco_llama import VoCoLlamaProcessor
from ..modeling.tiled_processing_voco_llama import check_grid
from .checkpoint import EMBEDDING, Checkpoint
from .loading import quiet, some
from .source_files import as_value_error
from .voco_token import chat_template


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unknown"}


def load_tokenizer(checkpoint: Checkpoint, tokenizer: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer given, else that of the checkpoint, else none."""
    with as_value_error(
        f"the tokenizer of {tokenizer or checkpoint.source} cannot be loaded "
        "(a tokenizer.model takes the packages sentencepiece and protobuf)"
    ):
        if tokenizer is not None:
            return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        if any((checkpoint.source / name).is_file() for name in TOKENIZER_FILES):
            # transformers does not know the model type llava_llama, and would warn of it
            config = checkpoint.tokenizer_config
            return AutoTokenizer.from_pretrained(checkpoint.source, config=config, trust_remote_code=False)
    return None


def build_config(
    checkpoint: Checkpoint, voco_token_id: int, prefix: list[int], suffix: list[int], num_voco_tokens: int | None
) -> VoCoLlamaConfig:
    """The configuration of the converted model."""
    vocab_size = checkpoint.text_config.vocab_size
    if bad := [token_id for token_id in prefix + suffix if not 0 <= token_id < vocab_size]:
        raise ValueError(
            f"vision_prefix_token_ids {prefix} and vision_suffix_token_ids {suffix} hold {bad}; "
            f"ids of 0 to {vocab_size - 1} were expected"
        )
    arguments = checkpoint.llava_arguments.copy()
    if num_voco_tokens is not None:
        arguments["num_voco_tokens"] = num_voco_tokens
    with as_value_error("the configuration is not valid"):
        return VoCoLlamaConfig(
            text_config=checkpoint.text_config,
            vision_config=checkpoint.vision_config,
            voco_token_id=voco_token_id,
            vision_prefix_token_ids=prefix,
            vision_suffix_token_ids=suffix,
            **arguments,
        )


def build_model(
    checkpoint: Checkpoint, config: VoCoLlamaConfig, dtype: torch.dtype | None
) -> VoCoLlamaForConditionalGeneration:
    """The converted model. Every weight must be there, known and of the right shape."""
    with quiet():
        loaded: Any = VoCoLlamaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=checkpoint.state_dict,
            dtype=dtype or checkpoint.state_dict[EMBEDDING].dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    problems = [f"{title}: {some(info[key])}" for key, title in PROBLEMS.items() if info[key]]
    problems += [
        f"of another shape: {name} is {list(found)}, the configuration says {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])[:4]
    ]
    if problems:
        raise ValueError(
            f"the weights of {checkpoint.source} do not fit its configuration "
            f"(vision tower: {checkpoint.vision_tower}); {'; '.join(problems)}"
        )
    if (checkpoint.source / GENERATION_CONFIG_NAME).is_file():
        with as_value_error(f"{checkpoint.source / GENERATION_CONFIG_NAME} is not a generation configuration"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.source)
    return model


def build_processor(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None, num_voco_tokens: int
) -> VoCoLlamaProcessor | None:
    """The processor, if there is a tokenizer and an image processor to make it from."""
    if tokenizer is None:
        checkpoint.warnings.append(f"{checkpoint.source} has no tokenizer: no processor was written; pass tokenizer")
        return None
    image_processor = _load_image_processor(checkpoint)
    if image_processor is not None:
        check_grid(image_processor, checkpoint.llava_arguments.get("image_grid_pinpoints"))
    else:
        checkpoint.warnings.append(
            f"no image processor in {' or '.join(map(str, checkpoint.image_processor_sources))}: "
            "the tokenizer was written, but no processor; pass vision_tower"
        )
        return None
    return VoCoLlamaProcessor(
        image_processor,
        tokenizer,
        num_voco_tokens=num_voco_tokens,
        # Templates by name are taken too, which the annotation leaves out
        chat_template=cast(str | None, chat_template(checkpoint, tokenizer)),
    )


def _load_image_processor(checkpoint: Checkpoint) -> BaseImageProcessor | None:
    """The image processor of the vision tower, which pads images to squares first where the checkpoint says so."""
    for source in checkpoint.image_processor_sources:
        try:
            image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        except OSError:  # it has none
            continue
        if checkpoint.pad_to_square:
            # Saved as a LlavaImageProcessor, whose backend is chosen where it is loaded
            return LlavaImageProcessorPil.from_dict({**image_processor.to_dict(), "do_pad": True})
        return image_processor
    return None


def write(
    target: Path,
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor | PreTrainedTokenizerBase | None,
) -> None:
    """Writes everything into a folder next to `target`, which then takes its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as aside:
        generation_config, model.generation_config = model.generation_config, GenerationConfig()
        # Shards of this size show progress while they are written
        model.save_pretrained(aside, max_shard_size="5GB")
        # As it is: up to 5.22 transformers refuses to save what Vicuna has, a temperature without do_sample
        generation_config.to_json_file(aside / GENERATION_CONFIG_NAME)
        if processor is not None:
            processor.save_pretrained(aside)
