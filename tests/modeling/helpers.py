"""Tiny models and batches that the tests share: `from modeling.helpers import tiny_model`."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BaseImageProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor


PAD, BOS, NEWLINE, VOCO = 0, 1, 13, 127
VOCAB_SIZE = 128

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}


def tiny_config(
    text_class: type[PreTrainedConfig] = LlamaConfig,
    vision_class: type[PreTrainedConfig] = CLIPVisionConfig,
    text: dict | None = None,
    vision: dict | None = None,
    **overrides,
) -> VoCoLlamaConfig:
    """A 3-layer text model and a vision tower with 4 tokens an image; `text` and `vision` override theirs."""
    return VoCoLlamaConfig(
        **{
            "text_config": text_class(**{**TEXT, **(text or {})}),
            "vision_config": vision_class(**{**VISION, **(vision or {})}),
            "vision_feature_layer": -2,
            "voco_token_id": VOCO,
            "vision_prefix_token_ids": [BOS],
            "vision_suffix_token_ids": [NEWLINE],
            **overrides,
        }
    )


def tiny_model(seed: int = 0, config: VoCoLlamaConfig | None = None, **overrides) -> VoCoLlamaForConditionalGeneration:
    """
    A random model of `tiny_config(**overrides)` whose outputs differ clearly between inputs. Norms and biases are
    random as well, so that none of them can be left out unnoticed. It hardly ever answers with a `<voco>` token.
    """
    device = torch.get_default_device()
    generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VoCoLlamaForConditionalGeneration(tiny_config(**overrides) if config is None else config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.15 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + parameter if parameter.ndim == 1 else noise)
        model.lm_head.weight[VOCO] = 0
    return model.eval()


GRID = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84], [84, 84]]
# A model of each kind that divides images into tiles of 4 tokens
TILED: dict[str, dict] = {
    "llava_next": {"base_model_type": "llava_next", "image_grid_pinpoints": GRID},
    "llava_onevision": {
        "base_model_type": "llava_onevision",
        "image_grid_pinpoints": [*GRID, [28, 28]],
        "vision_aspect_ratio": "anyres_max_4",
        "vision_class": SiglipVisionConfig,
        "text_class": Qwen2Config,
        "vision": {"vision_use_head": False},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


def random_images(model: VoCoLlamaForConditionalGeneration, sizes: list[tuple[int, int]], seed: int = 0) -> dict:
    """`pixel_values` and `image_sizes` of random images of these heights and widths, padded as processors do."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    side = config.vision_config.image_size
    counts = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, side, side)
    for image, count in enumerate(counts):
        pixels[image, :count] = torch.randn(count, 3, side, side, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def random_pixels(model: VoCoLlamaForConditionalGeneration, num_images: int, seed: int = 0) -> torch.Tensor:
    """`(num_images, 3, height, width)` random images for `model`."""
    size = model.config.vision_config.image_size
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(num_images, 3, size, size, generator=generator)


def random_rows(layouts: list[list[str]], seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Token ids of each row and VoCo tokens of each image, see [`random_inputs`]."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows, counts = [], []
    for layout in layouts:
        row: list[int] = []
        for part in layout:
            kind, number = part.split(":")
            if kind == "image":
                row += [VOCO] * int(number)
                counts.append(int(number))
            else:
                row += torch.randint(3, VOCO, (int(number),), generator=generator).tolist()
        rows.append(row)
    return rows, counts


def pad_rows(rows: list[list[int]], padding_side: str = "left") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of rows of token ids."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        place = slice(length - len(row), length) if padding_side == "left" else slice(0, len(row))
        ids[r, place], mask[r, place] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def random_inputs(
    model: VoCoLlamaForConditionalGeneration, layouts: list[list[str]], padding_side: str = "left", seed: int = 0
) -> dict:
    """
    A padded batch with random text and images: what a processor returns.

    Args:
        layouts: The parts of each row in order, `"text:3"` for three text tokens and `"image:2"` for an image of two
            VoCo tokens, as in `[["text:3", "image:2", "text:4"], ["text:5"]]`.
    """
    rows, counts = random_rows(layouts, seed)
    inputs = pad_rows(rows, padding_side)
    if counts:
        inputs |= {"pixel_values": random_pixels(model, len(counts), seed), "num_voco_tokens": torch.tensor(counts)}
    return inputs


def single_rows(inputs: dict) -> list[dict]:
    """The rows of a batch one by one, each without padding and with its own images only."""
    counts = inputs["num_voco_tokens"].tolist() if "num_voco_tokens" in inputs else []
    rows, image = [], 0
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        row: dict = {"input_ids": ids[mask.bool()][None], "attention_mask": mask[mask.bool()][None]}
        left, first = int((row["input_ids"] == VOCO).sum()), image
        while left > 0:
            left -= counts[image]
            image += 1
        if image > first:
            row["pixel_values"] = inputs["pixel_values"][first:image]
            row["num_voco_tokens"] = inputs["num_voco_tokens"][first:image]
        rows.append(row)
    return rows


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: "
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}{% endgeneration %}"
    "{% elif message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' }}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def build_processor(base_model_type: str = "llava") -> VoCoLlamaProcessor:
    """
    A processor for a model of this kind. Its tokenizer knows bytes, adds a BOS token and has an id below `VOCAB_SIZE`
    for every token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(set(map(chr, range(33, 127))) | {"Ċ", "Ġ"})
    specials = ["<pad>", "<s>", "</s>", "<voco>"]
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=specials, initial_alphabet=letters)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<voco>"],
        padding_side="left",
    )
    side = VISION["image_size"]
    size = {"height": side, "width": side}
    if base_model_type == "llava":
        images: BaseImageProcessor = CLIPImageProcessorPil(size=size, do_center_crop=False)
    elif base_model_type == "llava_next":
        grid = TILED[base_model_type]["image_grid_pinpoints"]
        images = LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size=size, image_grid_pinpoints=grid)
    else:
        grid = TILED[base_model_type]["image_grid_pinpoints"]
        images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=grid)
    return VoCoLlamaProcessor(images, fast, chat_template=CHAT_TEMPLATE)
