"""The processor and the model that a recipe trains: from random weights, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import interpolate
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .data import draw_scene
from .recipe import Recipe


PATCH_SIZE = 8
TOKENIZER_SCENES = 4000  # whose questions and answers the tokenizer is trained on
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- else -%}{{ '<' + part.type + '>\\n' }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- set text = render(message.content) -%}
{%- if loop.first and not text.startswith(('<image>', '<video>')) -%}{{ bos_token }}{%- endif -%}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ text + eos_token }}{%- endgeneration -%}
{%- else -%}{{ text + '\\n' }}{%- endif -%}
{%- endfor -%}"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of at most 512 tokens: common words are single tokens, and any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<s>", "</s>", "<image>", "<voco>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "voco_token": "<voco>"},
        model_max_length=4096,
        padding_side="left",
    )


def build_processor(recipe: Recipe) -> VoCoLlamaProcessor:
    """The processor of the checkpoint that `recipe` starts from, or a new one with a tokenizer of its own."""
    if recipe.start is not None:
        processor = VoCoLlamaProcessor.from_pretrained(recipe.start)
        processor.image_processor.size = {"height": recipe.canvas.side, "width": recipe.canvas.side}
        add_tokens(processor, recipe.canvas.words)
        return processor
    image_processor = CLIPImageProcessorPil(
        size={"height": recipe.canvas.side, "width": recipe.canvas.side},
        do_center_crop=False,
        # Of the scenes: their dark background is near 0
        image_mean=[0.15] * 3,
        image_std=[0.25] * 3,
    )
    tokenizer = train_tokenizer(spoken_texts(recipe))
    return VoCoLlamaProcessor(image_processor, tokenizer, num_voco_tokens=1, chat_template=CHAT_TEMPLATE)


def spoken_texts(recipe: Recipe) -> Iterator[str]:
    """Questions and answers of the first scenes of the training."""
    for index in range(min(recipe.num_train_scenes, TOKENIZER_SCENES)):
        scene = draw_scene(recipe, "train", index, questions=8)
        yield from (f"{question}\n{answer}" for question, answer in zip(scene["questions"], scene["answers"]))


def build_model(processor: VoCoLlamaProcessor, recipe: Recipe) -> VoCoLlamaForConditionalGeneration:
    """The model of the checkpoint that `recipe` starts from, made to read its canvas, or one of random weights."""
    torch.manual_seed(recipe.seed)
    if recipe.start is not None:
        return start_model(processor, recipe, recipe.start)
    config = random_config(processor, recipe)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=recipe.attention, dtype=torch.float32)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    # From CLIP's own small random start the model is slow to learn where things are
    positions.data[1:] = grid_waves(recipe.canvas.side // PATCH_SIZE, config.vision_config.hidden_size)
    return model


def random_config(processor: VoCoLlamaProcessor, recipe: Recipe) -> VoCoLlamaConfig:
    """Patches of 8x8 pixels, and a Llama with grouped queries."""
    tokenizer = processor.tokenizer
    special_ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision_config = CLIPVisionConfig(
        image_size=recipe.canvas.side,
        patch_size=PATCH_SIZE,
        hidden_size=recipe.vision_width,
        intermediate_size=8 * recipe.vision_width // 3,
        num_hidden_layers=recipe.vision_layers,
        num_attention_heads=recipe.vision_width // 64,
    )
    text_config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=2 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.text_width // 4,
        max_position_embeddings=4096,
        **special_ids,
    )
    return VoCoLlamaConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_feature_layer=-1,
        voco_token_id=tokenizer.convert_tokens_to_ids("<voco>"),
        vision_prefix_token_ids=[tokenizer.bos_token_id],
        vision_suffix_token_ids=tokenizer("\n", add_special_tokens=False).input_ids,
        **special_ids,
    )


def start_model(processor: VoCoLlamaProcessor, recipe: Recipe, start: str) -> VoCoLlamaForConditionalGeneration:
    """The weights of a checkpoint in a model that reads images of the size of the canvas."""
    weights = VoCoLlamaForConditionalGeneration.from_pretrained(start, dtype=torch.float32).state_dict()
    config = VoCoLlamaConfig.from_pretrained(start)
    config.vision_config.image_size = recipe.canvas.side
    name = "model.vision_tower.embeddings.position_embedding.weight"
    weights[name] = enlarge_positions(weights[name], recipe.canvas.side // config.vision_config.patch_size)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=recipe.attention, dtype=torch.float32)
    model.load_state_dict(weights)
    model.resize_token_embeddings(len(processor.tokenizer))
    return model


def enlarge_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """
    Positions of a class token and of a square grid, rows first, `(1 + patches, width)`, for a grid of `side` patches a
    side.
    """
    class_position, grid = positions[:1], positions[1:].T
    old = round(grid.shape[1] ** 0.5)
    grid = interpolate(grid.unflatten(1, (old, old))[None], (side, side), mode="bicubic", align_corners=False)[0]
    return torch.cat([class_position, grid.flatten(1).T])


def add_tokens(processor: VoCoLlamaProcessor, words: tuple[str, ...]) -> None:
    """Makes tokens of words that the tokenizer has not seen in its training."""
    tokens = [AddedToken(word, normalized=False, single_word=not word.startswith(" ")) for word in words]
    processor.tokenizer.add_tokens(tokens)


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column of a square grid, rows first: `(side * side, width)`."""
    frequencies = 20 ** -torch.linspace(0, 1, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return torch.cat([waves[rows], waves[columns]], dim=-1)
