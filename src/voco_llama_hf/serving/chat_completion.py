"""Chat completions about images, each of which is compressed the first time that it is seen."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import CompletionUsage, PromptTokensDetails

from ..images import TooLargeError, decode_image
from ..modeling import VoCoCache
from ..modeling.cache_voco_llama import MAX_VOCO_TOKENS
from ..modeling.tiled_processing_voco_llama import check_divides_images
from ..pictures import choose_number, prepare
from ..prompts import check_num_tokens, check_text_length, render, starts_with_bos
from ..vision_tokens import count_image_tiles
from .answers import Answer, Job, Picture
from .engine import Engine
from .image_cache import hash_bytes
from .limits import Limits, error_body
from .messages import check_options, is_integer, parse_body, parse_messages, parse_stops, shown
from .remote_images import ImageLoader, decode_data_url, is_data_url
from .sampling import Sampling


T = TypeVar("T")

READERS = 1  # threads that tokenize and decode: more take the event loop's turns, and hold hundreds of megabytes each
CLIENT_GONE = 499
PER_TILE = "num_voco_tokens_per_tile"
NUMBERS = ("num_voco_tokens", PER_TILE)


@dataclass(frozen=True)
class Asked:
    """
    A request that was read, but for its images.

    Args:
        body (`dict`): What it says.
        prompt (`str`): Its text.
        input_ids (`list[int]`): Tokens of its prompt; until its images are read, as if each were one tile.
        urls (`list[str]`): Where its images are, in order.
        num_voco_tokens (`int`): VoCo tokens of each, or of each of their tiles.
        per_tile (`bool`): Which of both.
    """

    body: dict[str, Any]
    prompt: str
    input_ids: list[int]
    urls: list[str]
    num_voco_tokens: int
    per_tile: bool


class ChatCompletions:
    """
    Answers `/v1/chat/completions`. A request may choose `num_voco_tokens`, or `num_voco_tokens_per_tile` of a model
    that divides images into tiles, and the usage of its response says how many tokens of the prompt came from images
    that were compressed before.

    Args:
        model_id (`str`): What clients call the model.
        engine ([`Engine`]): Computes.
        loader ([`ImageLoader`]): Fetches the images of requests.
        limits ([`Limits`]): What a request may ask for.
    """

    def __init__(self, model_id: str, engine: Engine, loader: ImageLoader, limits: Limits):
        self.model_id, self.engine, self.loader, self.limits = model_id, engine, loader, limits
        self.processor, self.window = engine.processor, engine.window
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="voco-llama-reader")

    async def answer(self, request: Request, request_id: str) -> Response:
        """
        A JSON response, or a stream of events.

        Raises:
            HTTPException: if the request cannot be answered as it is.
        """
        # Not request.body(), which would keep it
        return await unless_gone(
            request, self._answer(b"".join([part async for part in request.stream()]), request_id)
        )

    async def _answer(self, content: bytes, request_id: str) -> Response:
        asked = await self._in_thread(self._read, content)
        del content  # of megabytes, as `asked` is, and not needed for what may take a while
        pictures, left = [], self.limits.max_request_bytes
        for url in asked.urls:
            if is_data_url(url):
                image = await self._in_thread(decode_data_url, url)
            else:
                image = await self.loader.load(url, left)
                left -= len(image)
            pictures.append(await self._in_thread(self._picture, image, asked))
        if asked.per_tile:
            asked = await self._in_thread(self._with_tiles, asked, pictures)
        job = Job(
            asked.input_ids,
            pictures,
            asked.num_voco_tokens,
            asked.per_tile,
            Sampling.of_request(asked.body, self.engine.model.generation_config),
            self._max_tokens(asked),
            parse_stops(asked.body),
        )
        is_stream, options = asked.body.get("stream"), asked.body.get("stream_options") or {}
        reply = Reply(request_id, self.model_id, len(job.input_ids))
        del asked
        if is_stream:
            events = self._events(job, reply, bool(options.get("include_usage")))
            return StreamingResponse(events, media_type="text/event-stream")
        answer = self.engine.submit(job)
        try:
            text = "".join([piece async for piece in answer])
        except RuntimeError as error:
            raise HTTPException(500, str(error)) from error
        finally:
            answer.cancel()
        return JSONResponse(reply.whole(text, answer))

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *args)

    # What threads read

    def _read(self, content: bytes) -> Asked:
        body = parse_body(content)
        check_options(body, self.limits)
        if body.get("model") not in (None, self.model_id):
            raise HTTPException(404, f"this server has the model {self.model_id!r}, not {shown(body['model'])}")
        num_voco_tokens, per_tile = self._num_voco_tokens(body)
        question = parse_messages(body.get("messages"), self.processor, self.limits, self.window)
        with bad_requests():
            prompt = render(question.messages, self.processor)
            check_text_length(prompt, self.processor, self.window)
            self._check_tokens(prompt, len(question.urls))
            input_ids = self._tokenize(prompt, [1] * len(question.urls), num_voco_tokens)
        return Asked(body, prompt, input_ids, question.urls, num_voco_tokens, per_tile)

    def _with_tiles(self, asked: Asked, pictures: list[Picture]) -> Asked:
        """A request whose images are read, so that their tiles are known."""
        with bad_requests():
            tiles = [picture.num_tiles for picture in pictures]
            return replace(asked, input_ids=self._tokenize(asked.prompt, tiles, asked.num_voco_tokens))

    def _num_voco_tokens(self, body: dict[str, Any]) -> tuple[int, bool]:
        """VoCo tokens of an image, or of each of its tiles, and which of both."""
        given = [name for name in NUMBERS if body.get(name) is not None]
        if not given:
            return choose_number(self.processor)
        if len(given) > 1:
            raise HTTPException(400, f"a request has {' or '.join(NUMBERS)}, not both")
        name, asked = given[0], body[given[0]]
        if not is_integer(asked) or not 1 <= asked <= MAX_VOCO_TOKENS:
            raise HTTPException(400, f"{name} must be an integer from 1 to {MAX_VOCO_TOKENS}, got {shown(asked)}")
        if name == PER_TILE:
            with bad_requests():
                check_divides_images(self.processor.image_processor)
        return asked, name == PER_TILE

    def _check_tokens(self, prompt: str, num_images: int) -> None:
        """Tokens of images can also be put together from the ends of two texts."""
        processor = self.processor
        found = prompt.count(processor.image_token)
        if found != num_images or processor.video_token in prompt or processor.voco_token in prompt:
            raise ValueError(
                f"the messages make a prompt with {found} {processor.image_token} tokens for {num_images} images: "
                "send images as parts of type image_url"
            )

    def _tokenize(self, prompt: str, num_tiles: list[int], num_voco_tokens: int) -> list[int]:
        """Tokens of a prompt whose images have so many tiles with VoCo tokens of their own."""
        options: dict[str, Any] = {"add_special_tokens": not starts_with_bos(prompt, self.processor)}
        if num_tiles:
            # Stands in for images that are not compressed yet: the processor looks at their numbers alone
            blank = torch.zeros(sum(num_tiles) * num_voco_tokens, 1, 1, 1)
            options["voco_cache"] = VoCoCache(blank, blank, [num_voco_tokens] * sum(num_tiles), {})
            options["num_tiles"] = num_tiles
        input_ids = self.processor(text=prompt, **options)["input_ids"][0]
        check_num_tokens(len(input_ids), self.window)
        return input_ids

    def _max_tokens(self, asked: Asked) -> int:
        body = asked.body
        wanted = body.get("max_completion_tokens") or body.get("max_tokens") or self.limits.max_tokens
        return min(wanted, self.window - len(asked.input_ids))

    def _picture(self, content: bytes, asked: Asked) -> Picture:
        """An image that was seen before, or small enough to wait."""
        content_hash = hash_bytes(content)
        known = self.engine.images.get(content_hash, asked.num_voco_tokens, asked.per_tile)
        if known is not None:
            return Picture(content_hash, known, num_tiles=len(known))
        with bad_requests():
            image = decode_image(content, max_pixels=self.limits.max_pixels)
            pixels = prepare(self.processor.image_processor, image)
        size = image.height, image.width
        num_tiles = count_image_tiles(self.engine.model.config, size) if asked.per_tile else 1
        return Picture(content_hash, None, pixels, num_tiles)

    # What stands in a stream

    async def _events(self, job: Job, reply: "Reply", include_usage: bool) -> AsyncIterator[str]:
        yield reply.chunk(ChoiceDelta(role="assistant", content=""))
        answer = self.engine.submit(job)
        try:
            async for piece in answer:
                yield reply.chunk(ChoiceDelta(content=piece))
            yield reply.chunk(ChoiceDelta(), answer.finish_reason)
            if include_usage:
                yield reply.usage_chunk(answer)
        except RuntimeError as error:
            yield event(json.dumps(error_body(500, str(error))))
        finally:
            answer.cancel()
        yield event("[DONE]")


class Reply:
    """
    What a response says of an answer.

    Args:
        request_id (`str`): Its name.
        model_id (`str`): The model's.
        num_prompt_tokens (`int`): Tokens of the prompt.
    """

    def __init__(self, request_id: str, model_id: str, num_prompt_tokens: int):
        self.about: dict[str, Any] = {"id": request_id, "model": model_id, "created": int(time.time())}
        self.num_prompt_tokens = num_prompt_tokens

    def whole(self, text: str, answer: Answer) -> dict[str, Any]:
        """All of it."""
        message = ChatCompletionMessage(role="assistant", content=text)
        choice = Choice(index=0, message=message, finish_reason=answer.finish_reason or "stop", logprobs=None)
        usage = self._usage(answer)
        completion = ChatCompletion(object="chat.completion", choices=[choice], usage=usage, **self.about)
        return completion.model_dump(exclude_unset=True)

    def chunk(self, delta: ChoiceDelta, finish_reason: Literal["stop", "length"] | None = None) -> str:
        """An event with a piece of it, or with the reason for its end."""
        choices = [ChunkChoice(index=0, delta=delta, finish_reason=finish_reason)]
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self.about)
        return event(chunk.model_dump_json(exclude_unset=True))

    def usage_chunk(self, answer: Answer) -> str:
        """The last event, if it was asked for."""
        usage = self._usage(answer)
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self.about)
        return event(chunk.model_dump_json(exclude_unset=True))

    def _usage(self, answer: Answer) -> CompletionUsage:
        return CompletionUsage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=answer.num_tokens,
            total_tokens=self.num_prompt_tokens + answer.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=answer.cached_tokens),
        )


def event(data: str) -> str:
    return f"data: {data}\n\n"


@contextmanager
def bad_requests() -> Any:
    """What is wrong with the values of a request, as a response."""
    try:
        yield
    except TooLargeError as error:
        raise HTTPException(413, str(error)) from error
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


async def unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """What `work` returns; it is cancelled when the client goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=CLIENT_GONE)
    finally:
        gone.cancel()
        task.cancel()


async def disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


__all__ = ["ChatCompletions"]
