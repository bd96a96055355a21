"""The model's semantics computed another way: token by token in Python, on transformers' own Llama and Llava."""

from dataclasses import dataclass

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)


@dataclass
class Image:
    """An image in a row: its number among the images of the batch, and its VoCo tokens."""

    index: int
    num_voco_tokens: int


Row = list[list[int] | Image]  # text is a list of ids


CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
}


def stock_llava(model):
    """Transformers' own class with the weights of `model`, computing with eager attention."""
    config = model.config
    config_class, model_class = CLASSES[config.base_model_type]
    tiled = {}
    if config.base_model_type != "llava":
        tiled["image_grid_pinpoints"] = config.image_grid_pinpoints
    if config.base_model_type == "llava_onevision":
        tiled |= {"vision_aspect_ratio": config.vision_aspect_ratio, "video_token_index": config.voco_token_id - 1}
    llava = model_class(
        config_class(
            text_config=config.text_config.to_dict(),
            vision_config=config.vision_config.to_dict(),
            image_token_index=config.voco_token_id,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            attn_implementation="eager",
            **tiled,
        )
    )
    llava.load_state_dict(model.state_dict())
    return llava.eval()


def stock_features(llava, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None) -> list[torch.Tensor]:
    """Vision tokens of each image as transformers has them."""
    if len(pixel_values) == 0:
        return []
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
    return list(llava.model.get_image_features(pixel_values=pixel_values, **sizes).pooler_output)


def short_batch(rows: list[Row], config, padding_side: str) -> dict:
    """What the model is given: padded short sequences, and one count an image."""
    sequences = []
    for row in rows:
        ids: list[int] = []
        for part in row:
            ids += [config.voco_token_id] * part.num_voco_tokens if isinstance(part, Image) else part
        sequences.append(ids)
    width = max(map(len, sequences))
    pad = [width - len(ids) for ids in sequences]
    if padding_side == "left":
        input_ids = [[0] * n + ids for n, ids in zip(pad, sequences)]
        mask = [[0] * n + [1] * len(ids) for n, ids in zip(pad, sequences)]
    else:
        input_ids = [ids + [0] * n for n, ids in zip(pad, sequences)]
        mask = [[1] * len(ids) + [0] * n for n, ids in zip(pad, sequences)]
    counts = [part.num_voco_tokens for row in rows for part in row if isinstance(part, Image)]
    return {
        "input_ids": torch.tensor(input_ids),
        "attention_mask": torch.tensor(mask),
        "num_voco_tokens": torch.tensor(counts, dtype=torch.long),
    }


@torch.no_grad()
def row_logits(
    model,
    llava,
    row: Row,
    pixel_values: torch.Tensor,
    causal: bool = False,
    image_sizes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits at every token of one short row, from a dense mask that is filled in token by token."""
    config = model.config
    embed = llava.get_input_embeddings()
    vision = stock_features(llava, pixel_values, image_sizes)
    tokens = []  # (embedding, kind, image, position), in the order of the long sequence
    position = 0
    for part in row:
        if isinstance(part, Image):
            prefix, suffix = config.vision_prefix_token_ids, config.vision_suffix_token_ids
            hidden = [embed(torch.tensor(i)) for i in prefix] + list(vision[part.index])
            hidden += [embed(torch.tensor(i)) for i in suffix]
            tokens += [(h, "hidden", part.index, position - len(hidden) + n) for n, h in enumerate(hidden)]
            for _ in range(part.num_voco_tokens):
                tokens.append((embed(torch.tensor(config.voco_token_id)), "voco", part.index, position))
                position += 1
        else:
            for token_id in part:
                tokens.append((embed(torch.tensor(token_id)), "text", None, position))
                position += 1

    def sees(query: int, key: int) -> bool:
        _, query_kind, query_image, _ = tokens[query]
        _, key_kind, key_image, _ = tokens[key]
        if key > query:
            return False
        if causal:
            return True
        if query_kind == "text":
            return key_kind in ("text", "voco")
        return key_image == query_image

    allowed = torch.tensor([[sees(q, k) for k in range(len(tokens))] for q in range(len(tokens))])
    positions = torch.tensor([[n if causal else token[3] for n, token in enumerate(tokens)]])
    hidden_states = llava.model.language_model(
        inputs_embeds=torch.stack([token[0] for token in tokens])[None],
        attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None],
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state[0]
    short = [n for n, token in enumerate(tokens) if token[1] != "hidden"]
    return llava.lm_head(hidden_states[short])


@torch.no_grad()
def uncompressed_row_logits(
    model, llava, row: Row, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None
) -> list[torch.Tensor | None]:
    """Llava's logits at every token of one short row; None at VoCo tokens but the last of an image."""
    config, vision = model.config, stock_features(llava, pixel_values, image_sizes)
    long_ids: list[int] = list(config.vision_prefix_token_ids) if isinstance(row[0], Image) else []
    places: list[int | None] = []
    for part in row:
        if isinstance(part, Image):
            long_ids += [config.voco_token_id] * len(vision[part.index])
            places += [None] * (part.num_voco_tokens - 1) + [len(long_ids) - 1]
        else:
            places += range(len(long_ids), len(long_ids) + len(part))
            long_ids += part
    images = [part.index for part in row if isinstance(part, Image)]
    sizes = {} if image_sizes is None else {"image_sizes": image_sizes[images]}
    logits = llava(
        input_ids=torch.tensor([long_ids]),
        pixel_values=pixel_values[images] if images else None,
        use_cache=False,
        **(sizes if images else {}),
    ).logits[0]
    return [None if place is None else logits[place] for place in places]
