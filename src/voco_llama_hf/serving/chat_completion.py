"""Chat completions about images, each of which is compressed the first time that it is seen."""

import asyncio
import copy
from functools import partial
from typing import Any

import torch
from fastapi import HTTPException
from openai.types.completion_usage import PromptTokensDetails
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import (
    ChatCompletionHandler,
    TransformersCompletionCreateParamsStreaming,
)
from transformers.cli.serving.utils import GenerationState

from ..images import TooLargeError, decode_image
from ..modeling import VoCoCache
from ..prompts import starts_with_bos
from .image_cache import ImageCache, hash_bytes
from .limits import Limits
from .messages import check_options, is_integer, parse_messages, shown
from .model_manager import VoCoModelManager
from .remote_images import ImageLoader


MAX_VOCO_TOKENS = 64
MIN_TEMPERATURE = 0.01  # below it logits overflow, and the likeliest token is drawn anyway


class VoCoCompletionCreateParams(TransformersCompletionCreateParamsStreaming, total=False):
    num_voco_tokens: int


class VoCoChatCompletionHandler(ChatCompletionHandler):
    """
    transformers' handler of `/v1/chat/completions` with images that are compressed once. A request may choose
    `num_voco_tokens`, and the usage of its response says how many tokens of the prompt came from images that were
    compressed before.

    Args:
        model_manager ([`VoCoModelManager`]):
            Holds the model.
        generation_state ([`~transformers.cli.serving.utils.GenerationState`]):
            Holds the thread that computes.
        images ([`ImageCache`]):
            Images that were compressed before.
        loader ([`ImageLoader`]):
            Reads the images of requests.
        limits ([`Limits`]):
            What a request may ask for.
    """

    _valid_params_class = VoCoCompletionCreateParams

    def __init__(
        self,
        model_manager: VoCoModelManager,
        generation_state: GenerationState,
        images: ImageCache,
        loader: ImageLoader,
        limits: Limits,
    ):
        super().__init__(model_manager, generation_state)
        self.images, self.loader, self.limits = images, loader, limits
        self.model, self.processor, self.model_id = (
            model_manager.model,
            model_manager.processor,
            model_manager.model_id,
        )
        self.cached_tokens = 0

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """See [`~transformers.cli.serving.chat_completion.ChatCompletionHandler.handle_request`]."""
        self._validate_request(body)
        check_options(body, self.limits)
        if body.get("model") not in (None, self.model_id):
            raise HTTPException(404, f"this server has the model {self.model_id!r}, not {shown(body['model'])}")
        question = parse_messages(body.get("messages"), self.processor, self.limits)
        num_voco_tokens = self._num_voco_tokens(body.get("num_voco_tokens"))
        prompt = self._prompt(question.messages)

        manager: Any = self.generation_state.get_manager(self.model_id)
        contents = [await self.loader.load(url) for url in question.urls]
        caches, cached_tokens = [], 0
        for content in contents:
            cache, is_known = await self._compressed(manager, content, num_voco_tokens)
            caches.append(cache)
            cached_tokens += num_voco_tokens if is_known else 0
        inputs = self._inputs(prompt, caches)
        config = self._build_generation_config(body, self.model.generation_config)
        self._bound_tokens(config, inputs["input_ids"].shape[1])

        # Of this request alone: the builders of its responses ask for the number of cached tokens
        own = copy.copy(self)
        own.cached_tokens = cached_tokens
        # The tokenizer in place of the processor: strings to stop at are looked up in its vocabulary
        args = (request_id, self.model, self.processor.tokenizer, self.model_id, inputs, config, manager)
        return own._streaming(*args) if body.get("stream") else await own._non_streaming(*args)

    def _num_voco_tokens(self, asked: Any) -> int:
        if asked is None:
            return self.processor.num_voco_tokens
        if not is_integer(asked) or not 1 <= asked <= MAX_VOCO_TOKENS:
            message = f"num_voco_tokens must be an integer from 1 to {MAX_VOCO_TOKENS}, got {shown(asked)}"
            raise HTTPException(400, message)
        return asked

    def _prompt(self, messages: list[dict]) -> str:
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error

    async def _compressed(self, manager: Any, content: bytes, num_voco_tokens: int) -> tuple[VoCoCache, bool]:
        """An image that was seen before, or is decoded and compressed now; and whether it was known."""
        content_hash = hash_bytes(content)
        known = self.images.get(content_hash, num_voco_tokens)
        if known is not None:
            return known, True
        try:
            # Made small before it waits; the store is asked later, by the thread that computes
            pixel_values = await asyncio.to_thread(self._read, content)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from error
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        compress = partial(self.model.compress, pixel_values, num_voco_tokens)
        return await manager.async_submit(self.images.get_or_compress, content_hash, num_voco_tokens, compress)

    def _read(self, content: bytes) -> torch.Tensor:
        """Pixels as the model takes them."""
        image = decode_image(content, max_pixels=self.limits.max_pixels)
        return self.processor(images=image, return_tensors="pt")["pixel_values"]

    def _inputs(self, prompt: str, caches: list[VoCoCache]) -> dict[str, Any]:
        """What `generate` takes."""
        options = {"add_special_tokens": not starts_with_bos(prompt, self.processor), "return_tensors": "pt"}
        if not caches:
            return dict(self.processor(text=prompt, **options).to(self.model.device))
        cache = VoCoCache.cat(caches).to(self.model.device)
        inputs = self.processor(text=prompt, voco_cache=cache, **options).to(self.model.device)
        return {**inputs, "voco_cache": cache}

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config = super()._build_generation_config(body, model_generation_config, use_cb)
        if body.get("temperature") is not None:
            config.do_sample = body["temperature"] >= MIN_TEMPERATURE
        if body.get("max_completion_tokens") is None and body.get("max_tokens") is None:
            config.max_new_tokens = self.limits.max_tokens
        return config

    def _bound_tokens(self, config: GenerationConfig, num_prompt_tokens: int) -> None:
        """
        Raises:
            HTTPException: if the prompt leaves no room for an answer.
        """
        window = self.model.config.text_config.max_position_embeddings
        if num_prompt_tokens >= window:
            raise HTTPException(
                400,
                f"the prompt has {num_prompt_tokens} tokens, but this model reads at most {window} with the answer",
            )
        config.max_new_tokens = min(config.max_new_tokens, window - num_prompt_tokens)

    # What stands in a response

    def _build_completion(self, *args: Any, **kwargs: Any) -> dict:
        return super()._build_completion(*args, **self._with_cached_tokens(kwargs))

    def _build_chunk_sse(self, *args: Any, **kwargs: Any) -> str:
        return super()._build_chunk_sse(*args, **self._with_cached_tokens(kwargs))

    def _with_cached_tokens(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The same, with the cached tokens among its usage, if it has one."""
        if kwargs.get("usage") is not None:
            kwargs["usage"].prompt_tokens_details = PromptTokensDetails(cached_tokens=self.cached_tokens)
        return kwargs


__all__ = ["VoCoChatCompletionHandler"]
