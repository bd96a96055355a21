"""What a client wrote, as tokens: our processor decides on them, so that they are those of `generate`."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.utils.async_utils import make_async

from ...modeling import VoCoCache, VoCoLlamaProcessor
from .limits import read_options
from .processing import Frame
from .stored_images import StoreReader, read_sent


class VoCoLlamaRenderer(HfRenderer):
    """
    Renders as vLLM does for models of transformers, but for the tokens. Every image, and every frame of a video,
    becomes one `<voco>`, which [`VoCoLlamaMultiModalProcessor`] multiplies; no other `<voco>` comes through.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any):
        super().__init__(config, tokenizer)
        self._expand_async = make_async(self._expand)
        processor: Any = self.get_mm_processor()
        # Now rather than with the first request: it may not fit the model
        hf_processor = processor.info.get_hf_processor()
        store = read_options(config).get("store")
        if store is not None:
            processor.read_from(StoreReader(store, processor.info.served_model, hf_processor))

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        return super().render_messages(messages, _with_parts(params))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        return await super().render_messages_async(messages, _with_parts(params))

    def tokenize_prompt(self, prompt: Any, params: TokenizeParams) -> Any:
        return self._check(super().tokenize_prompt(self._expand(prompt, params), params))

    async def tokenize_prompt_async(self, prompt: Any, params: TokenizeParams) -> Any:
        expanded = await self._expand_async(prompt, params)
        return self._check(await super().tokenize_prompt_async(expanded, params))

    @property
    def _processor(self) -> VoCoLlamaProcessor:
        return self.get_mm_processor().info.get_hf_processor()

    @property
    def _voco_token_id(self) -> int:
        return self.model_config.hf_config.voco_token_id

    def _expand(self, prompt: Any, params: TokenizeParams) -> Any:
        """A prompt with its tokens, in which images and videos are one list of images."""
        if "prompt_embeds" in prompt:
            raise ValueError("VoCo-LLaMA takes texts and tokens, no prompt_embeds: <voco> would not be seen in them")
        data, uuids = prompt.get("multi_modal_data") or {}, prompt.get("multi_modal_uuids") or {}
        if other := sorted(set(data) - {"image", "video"}):
            raise ValueError(f"VoCo-LLaMA takes images and videos, not {', '.join(other)}")
        images = [self._images_of(item) for item in as_items(data.get("image"))]
        videos = [[Frame(frame) for frame in frames_of(item)] for item in as_videos(data.get("video"))]
        if "prompt_token_ids" in prompt:
            ids, order = self._expand_ids(prompt["prompt_token_ids"], images, videos)
        else:
            prompt = params.apply_pre_tokenization(self.tokenizer, prompt)
            ids, order = self._expand_text(prompt["prompt"], images, videos, params.add_special_tokens)
        left = {name: value for name, value in prompt.items() if name not in ("multi_modal_data", "multi_modal_uuids")}
        expanded = {**left, "prompt_token_ids": ids}
        if order:
            groups = {"image": images, "video": videos}
            names = {kind: uuids.get(kind) or [None] * len(groups[kind]) for kind in groups}
            chosen = [(groups[kind][index], names[kind][index]) for kind, index in order]
            expanded["multi_modal_data"] = {"image": [item for group, _ in chosen for item in group]}
            expanded["multi_modal_uuids"] = {"image": [name for own in chosen for name in _names(*own)]}
        return expanded

    def _images_of(self, item: Any) -> list[Any]:
        """The images that one image of a request stands for: a file of compressed ones may have many."""
        if isinstance(item, torch.Tensor) and item.dtype == torch.uint8 and item.ndim == 2:
            item = read_sent(item)
        if isinstance(item, VoCoCache):
            self.get_mm_processor().info.served_model.check(item, self._processor, "this VoCoCache")
            return list(item)
        if hasattr(item, "ndim") and item.ndim != 3:
            raise ValueError(f"an image has shape (height, width, 3), got {tuple(item.shape)}")
        return [item]

    def _expand_text(
        self, text: str, images: list[list], videos: list[list], add_special_tokens: bool
    ) -> tuple[list[int], list[tuple[str, int]]]:
        """Tokens, and which image or video each placeholder is, in their order."""
        processor = self._processor
        groups, order = {"image": images, "video": videos}, []
        (placeholders,) = processor._find_placeholders([text]) or []
        kinds = [str(match.lastgroup) for match in placeholders]
        for kind, given in groups.items():
            if (found := kinds.count(kind)) != len(given):
                raise ValueError(f"the text has {found} <{kind}> tokens, but {len(given)} {kind}s were passed")
        parts, last, total = [], 0, 0
        for index, (match, kind) in enumerate(zip(placeholders, kinds)):
            order.append((kind, kinds[:index].count(kind)))
            size = len(groups[kind][order[-1][1]])
            parts += [text[last : match.start()], processor.image_token * size]
            last, total = match.end(), total + size
        text, cache = "".join([*parts, text[last:]]), _single_tokens(total) if order else None
        return processor(text=text, voco_cache=cache, add_special_tokens=add_special_tokens)["input_ids"][0], order

    def _expand_ids(
        self, ids: Sequence[int], images: list[list], videos: list[list]
    ) -> tuple[list[int], list[tuple[str, int]]]:
        """The same for a prompt that comes in tokens, where every image is one `<voco>`."""
        if videos:
            raise ValueError("a prompt in tokens can have images, but no videos: pass its text, or its frames")
        found = list(ids).count(self._voco_token_id)
        if found != len(images):
            raise ValueError(f"the prompt has {found} <voco> tokens, but {len(images)} images were passed")
        groups = iter(images)
        expanded = [[token] * len(next(groups)) if token == self._voco_token_id else [token] for token in ids]
        return list(chain.from_iterable(expanded)), [("image", index) for index in range(len(images))]

    def _check(self, prompt: Any) -> Any:
        """After truncation, which must not cut images off."""
        data = prompt.get("multi_modal_data") or {}
        found, expected = prompt["prompt_token_ids"].count(self._voco_token_id), len(data.get("image", []))
        if found != expected:
            raise ValueError(
                f"the prompt has {expected} images, but only {found} are left after truncation: increase "
                "truncate_prompt_tokens or leave it out"
            )
        return prompt


def _with_parts(params: ChatParams) -> ChatParams:
    # Every template of a VoCo-LLaMA reads lists of parts, however vLLM judges its code
    return replace(params, chat_template_content_format="openai")


def _names(group: list[Any], name: str | None) -> list[str | None]:
    """Names of the images of a group. Compressed ones are known by their content, whatever a client calls them."""
    if name is None or isinstance(group[0], VoCoCache):
        return [None] * len(group)
    # One frame of a video is another image than a picture of the same name: it is not divided into tiles
    return [f"{name}-{index}" for index in range(len(group))] if isinstance(group[0], Frame) else [name]


def _single_tokens(number: int) -> VoCoCache:
    """What the processor needs to know of images of one token each."""
    states = torch.empty(number, 1, 1, 1, device="meta")
    return VoCoCache(states, states, [1] * number, {})


def as_items(data: Any) -> list[Any]:
    """Images of a request, one or a list, or what a chat has made of files of compressed ones."""
    if data is None:
        return []
    if isinstance(data, dict):
        raise ValueError("image_embeds must be one array, the bytes of a VoCoCache file, see image_part")
    if isinstance(data, (list, tuple)):
        return list(data)
    are_files = isinstance(data, torch.Tensor) and data.dtype == torch.uint8 and data.ndim == 3 and data.shape[1] == 1
    return [*data] if are_files else [data]


def as_videos(data: Any) -> list[Any]:
    """Videos of a request, one or a list: arrays of frames, with or without what vLLM knows of them."""
    if data is None:
        return []
    return data if isinstance(data, list) else [data]


def frames_of(video: Any) -> list[Any]:
    frames = video
    # With the bytes of the file, with what is known of it, or with both, in either order
    while isinstance(frames, (tuple, MediaWithBytes)):
        frames = frames[0] if isinstance(frames, tuple) else frames.media
    if not isinstance(frames, (np.ndarray, torch.Tensor)) or frames.ndim != 4 or len(frames) == 0:
        raise ValueError("a video is an array of frames (num_frames, height, width, 3)")
    return list(frames)
