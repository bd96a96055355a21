"""Ways to answer a question about an image or a video: from VoCo tokens, from all vision tokens, or from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from ..llava import as_llava
from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.compat_voco_llama import CACHE
from ..pictures import choose, join, name_number, prepare


if TYPE_CHECKING:
    from datasets import Dataset

# Answers the questions about the images, or the videos, at these indices
Reader = Callable[[list[str], list[int]], list[str]]
# Shows of each video the frames at these indices, among the frames of all videos
VideoReader = Callable[[list[list[int]]], Reader]

# What `compress` takes of images
Pixels = dict[str, torch.Tensor]

MAX_ANSWER_TOKENS = 12


def preprocess(processor: VoCoLlamaProcessor, scenes: Dataset) -> Pixels:
    """The images of scenes, as [`VoCoLlamaForConditionalGeneration.compress`] takes them."""
    return prepare(processor.image_processor, list(scenes["image"]))


def voco_reader(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    pixels: Pixels,
    k: int,
    per_tile: bool = False,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> Reader:
    """
    Reads images from `k` VoCo tokens each, or from `k` of every tile, which are images of one size then; every image
    is compressed once, at the first question.
    """
    numbers = name_number(k, per_tile)
    cache: VoCoCache | None = None

    def read(questions: list[str], images: list[int]) -> list[str]:
        nonlocal cache
        if cache is None:
            cache = model.compress(**join([pixels], model.dtype), **numbers, show_progress=False)
        tiles = len(cache) // len(pixels["pixel_values"])
        entries = [image * tiles + tile for image in images for tile in range(tiles)]
        prompts = make_prompts(processor, questions)
        return _read_cache(model, processor, cache[entries], prompts, max_new_tokens, num_tiles=[tiles] * len(images))

    return read


def voco_video_reader(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    frames: Sequence[Image.Image],
    k: int,
    progress: bool = False,
) -> VideoReader:
    """Reads videos from `k` VoCo tokens a frame; every frame of `frames` is compressed once, when videos are shown."""
    cache: VoCoCache | None = None

    def show(shown: list[list[int]]) -> Reader:
        nonlocal cache
        if cache is None:
            pixels = processor.iter_pixel_values(frames)
            cache = model.compress(pixels, num_voco_tokens=k, show_progress=progress)
        compressed = cache

        def read(questions: list[str], videos: list[int]) -> list[str]:
            seen = [shown[video] for video in videos]
            batch = compressed[[index for indices in seen for index in indices]]
            prompts = make_prompts(processor, questions, "video")
            return _read_cache(model, processor, batch, prompts, MAX_ANSWER_TOKENS, num_frames=list(map(len, seen)))

        return read

    return show


def _read_cache(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    cache: VoCoCache,
    prompts: list[str],
    max_new_tokens: int,
    **options: list[int],
) -> list[str]:
    inputs = processor(
        text=prompts, voco_cache=cache, padding=True, padding_side="left", return_tensors="pt", **options
    ).to(model.device)
    ids = model.generate(**inputs, voco_cache=cache, max_new_tokens=max_new_tokens, do_sample=False)
    return decode_answers(processor, ids[:, inputs["input_ids"].shape[1] :])


def uncompressed_reader(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    pixels: Pixels,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> Reader:
    """Reads images, of one size, as a LLaVA of the same weights does, from all their vision tokens."""
    return _llava_reader(model, processor, pixels, placeholder=processor.voco_token, max_new_tokens=max_new_tokens)


def causal_reader(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    pixels: Pixels,
    k: int,
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> Reader:
    """Reads images of one size from all vision tokens and `k` VoCo tokens behind, nothing hidden (paper, Table 1)."""
    behind = processor.tokenizer.decode(model.config.vision_suffix_token_ids) + processor.voco_token * k
    placeholder = processor.image_token
    return _llava_reader(model, processor, pixels, placeholder, behind, max_new_tokens)


def _llava_reader(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    pixels: Pixels,
    placeholder: str,
    behind: str = "",
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> Reader:
    llava = as_llava(model, processor.tokenizer.convert_tokens_to_ids(placeholder))
    first = BatchFeature(choose(pixels, [0])).to(model.device, model.dtype)
    features = llava.get_image_features(**first, return_dict=True)
    prefix = processor.tokenizer.decode(model.config.vision_prefix_token_ids)
    image = prefix + placeholder * features.pooler_output[0].shape[0] + behind

    def read(questions: list[str], images: list[int]) -> list[str]:
        prompts = [prompt.replace(processor.image_token, image) for prompt in make_prompts(processor, questions)]
        return read_llava(llava, processor, prompts, images, partial(choose, pixels), max_new_tokens)

    return read


def uncompressed_video_reader(
    model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, frames: Sequence[Image.Image]
) -> VideoReader:
    """Reads videos as a LLaVA of the same weights does, from all vision tokens of all frames."""
    llava = as_llava(model)
    pixel_values = processor.image_processor(images=list(frames), return_tensors="pt").pixel_values
    first = model.model.get_vision_features(pixel_values[:1].to(model.device, model.dtype))
    frame = processor.voco_token * first.shape[1]
    prefix = processor.tokenizer.decode(model.config.vision_prefix_token_ids)

    def show(shown: list[list[int]]) -> Reader:
        def read(questions: list[str], videos: list[int]) -> list[str]:
            seen = [shown[video] for video in videos]
            prompts = [
                prompt.replace(processor.video_token, prefix + frame * len(indices))
                for prompt, indices in zip(make_prompts(processor, questions, "video"), seen, strict=True)
            ]

            def frames_of(chosen: list[int]) -> Pixels:
                return {"pixel_values": pixel_values[[index for video in chosen for index in shown[video]]]}

            return read_llava(llava, processor, prompts, videos, frames_of)

        return read

    return show


def read_llava(
    llava: PreTrainedModel,
    processor: VoCoLlamaProcessor,
    prompts: list[str],
    shown: list[int],
    pixels_of: Callable[[list[int]], Pixels],
    max_new_tokens: int = MAX_ANSWER_TOKENS,
) -> list[str]:
    """
    Answers of a LLaVA. What several prompts show is read once, for all of them.

    Args:
        llava ([`~transformers.PreTrainedModel`]): The model.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        prompts (`list[str]`): Texts with a placeholder for every vision token, the same up to the last one where the
            same is shown.
        shown (`list[int]`): What each prompt shows, by its number.
        pixels_of (`Callable`): Pixels of what has these numbers.
        max_new_tokens (`int`): Longest answer.
    """
    rows = processor.tokenizer(prompts, add_special_tokens=False).input_ids
    ends = [len(row) - row[::-1].index(llava.config.image_token_id) for row in rows]
    place = {one: index for index, one in enumerate(dict.fromkeys(shown))}
    first = [shown.index(one) for one in place]
    pad = partial(processor.tokenizer.pad, padding_side="left", return_tensors="pt")
    heads = pad({"input_ids": [rows[index][: ends[index]] for index in first]}).to(llava.device)
    tails = pad({"input_ids": [row[end:] for row, end in zip(rows, ends)]}).to(llava.device)
    with torch.no_grad():
        cache = llava(
            **heads,
            position_ids=(heads["attention_mask"].cumsum(-1) - 1).clamp(min=0),
            **BatchFeature(pixels_of(list(place))).to(llava.device, llava.dtype),
            use_cache=True,
            logits_to_keep=1,
        )[CACHE]
    chosen = torch.tensor([place[one] for one in shown], device=llava.device)
    cache.batch_select_indices(chosen)
    inputs = {name: torch.cat([heads[name][chosen], tails[name]], dim=1) for name in ("input_ids", "attention_mask")}
    ids = llava.generate(**inputs, **{CACHE: cache}, max_new_tokens=max_new_tokens, do_sample=False)
    return decode_answers(processor, ids[:, inputs["input_ids"].shape[1] :])


def make_prompts(processor: VoCoLlamaProcessor, questions: Sequence[str], kind: str = "image") -> list[str]:
    """Questions about an `"image"` or a `"video"` each, in the form of the chat template."""
    conversations = [
        [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}] for question in questions
    ]
    return processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)


def decode_answers(processor: VoCoLlamaProcessor, ids: torch.Tensor) -> list[str]:
    """Texts of generated ids `(batch_size, max_new_tokens)`."""
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
