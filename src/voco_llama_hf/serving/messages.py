"""What may stand in a chat completion request, checked before anything is computed."""

from dataclasses import dataclass
from typing import Any, TypeGuard

import pydantic_core
from fastapi import HTTPException
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from ..modeling import VoCoLlamaProcessor
from .limits import Limits


PARAMETERS = {*CompletionCreateParamsBase.__annotations__, "stream", "num_voco_tokens", "num_voco_tokens_per_tile"}
SUPPORTED = {
    "messages", "model", "stream", "stream_options", "num_voco_tokens", "num_voco_tokens_per_tile", "max_tokens",
    "max_completion_tokens", "stop", "temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "n",
}  # fmt: skip
# What says who asks, and changes no answer
IGNORED = {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}
# Ways to ask for what is done anyway; everything else that is not supported is refused: better than ignored
NOTHING: tuple[object, ...] = (None, False, [], {}, "none", 0)
DEFAULTS = {"parallel_tool_calls": True, "response_format": {"type": "text"}, "modalities": ["text"]}
BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 1000
MAX_COMMAS = 500_000  # what JSON with more holds are values without end, and nothing else runs while it is parsed
MESSAGE_KEYS = {"role", "content", "name"}


@dataclass(frozen=True)
class Question:
    """
    Args:
        messages (`list[dict]`): Messages for the chat template, with a part of type `"image"` for every image.
        urls (`list[str]`): Where the images are, in order.
    """

    messages: list[dict[str, Any]]
    urls: list[str]


def parse_body(content: bytes) -> dict[str, Any]:
    """
    The JSON object of a request.

    Raises:
        HTTPException: if it is none, or holds text that is none, such as half a surrogate pair.
    """
    if content.count(b",") > MAX_COMMAS:
        raise HTTPException(413, f"the request is too large: it holds more than {MAX_COMMAS:,} values")
    try:
        body = pydantic_core.from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body of a request is a JSON object: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body of a request is a JSON object")
    return body


def check_options(body: dict[str, Any], limits: Limits) -> None:
    """
    Raises:
        HTTPException: if an option is unknown, not supported, of the wrong type or out of bounds.
    """
    for name, value in body.items():
        if name in SUPPORTED | IGNORED:
            continue
        if name not in PARAMETERS or (value not in NOTHING and value != DEFAULTS.get(name)):
            raise HTTPException(400, f"{shown(name)[1:-1]} is not supported")
    if body.get("n") not in (None, 1):
        raise HTTPException(400, "n must be 1: a request gets one answer")
    for name, (low, high) in BOUNDS.items():
        value = body.get(name)
        if value is not None and not (is_number(value) and low <= value <= high):
            raise HTTPException(400, f"{name} must be a number from {low:g} to {high:g}, got {shown(value)}")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and not (is_integer(value) and 1 <= value <= limits.max_tokens):
            raise HTTPException(400, f"{name} must be an integer from 1 to {limits.max_tokens}, got {shown(value)}")
    seed = body.get("seed")
    if seed is not None and not (is_integer(seed) and -(2**63) <= seed < 2**63):
        raise HTTPException(400, f"seed must be an integer of 64 bits, got {shown(seed)}")
    if not isinstance(body.get("stream"), bool | None):
        raise HTTPException(400, "stream must be true or false")
    check_stream_options(body)
    parse_stops(body)


def check_stream_options(body: dict[str, Any]) -> None:
    """
    Raises:
        HTTPException: if they are not those of a stream, or of the wrong type.
    """
    options = body.get("stream_options")
    if options is None:
        return
    if not isinstance(options, dict) or not isinstance(options.get("include_usage"), bool | None):
        raise HTTPException(400, 'stream_options are written {"include_usage": true}')
    if not body.get("stream"):
        raise HTTPException(400, "stream_options are for requests with stream")


def parse_stops(body: dict[str, Any]) -> list[str]:
    """
    Texts at which an answer stops.

    Raises:
        HTTPException: if they are none, too many or too long.
    """
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS for text in stops)
    ):
        message = (
            f"stop must be a string or a list of up to {MAX_STOPS} strings of up to {MAX_STOP_CHARACTERS} letters"
        )
        raise HTTPException(400, message)
    return stops


def shown(value: object) -> str:
    """A value in an error message, cut short."""
    return f"{value!r:.60}"


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def parse_messages(messages: object, processor: VoCoLlamaProcessor, limits: Limits, window: int) -> Question:
    """
    Messages in OpenAI's format for the chat template.

    Args:
        messages (`list[dict]`): As the request has them.
        processor ([`VoCoLlamaProcessor`]): Whose tokens must not stand in a text.
        limits ([`Limits`]): How many images there may be.
        window (`int`): Tokens that the model reads; no more messages and parts are worth a look.

    Raises:
        HTTPException: if they are none, hold what the model cannot read, or too many images.
    """
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages must be a list of at least one message")
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    num_parts = len(messages) + sum(len(content) for content in contents if isinstance(content, list))
    if num_parts > window:
        raise HTTPException(
            400, f"the request has {num_parts:,} messages and parts, but this model reads at most {window} tokens"
        )
    urls: list[str] = []
    parsed = [parse_message(message, processor, urls) for message in messages]
    if len(urls) > limits.max_images:
        raise HTTPException(400, f"a request may have {limits.max_images} images, got {len(urls)}")
    return Question(parsed, urls)


def parse_message(message: object, processor: VoCoLlamaProcessor, urls: list[str]) -> dict[str, Any]:
    """One message; the URLs of its images are added to `urls`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HTTPException(400, "a message is an object with a role and a content")
    # The answers of OpenAI's client have such keys, with nothing in them
    for name, value in message.items():
        if name not in MESSAGE_KEYS and value not in NOTHING:
            raise HTTPException(400, f"{shown(name)} of a message is not supported")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise HTTPException(400, "the content of a message is a string or a list of parts")
    parts = [parse_part(part, processor, urls) for part in content]
    return {"role": message["role"], "content": parts}


def parse_part(part: dict[str, Any], processor: VoCoLlamaProcessor, urls: list[str]) -> dict[str, Any]:
    """One part of a message; the URL of an image is added to `urls`."""
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        for token in (processor.image_token, processor.video_token, processor.voco_token):
            if token in part["text"]:
                raise HTTPException(400, f"{token} stands for an image: send images as parts of type image_url")
        return {"type": "text", "text": part["text"]}
    if part.get("type") == "image_url":
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise HTTPException(400, 'an image is {"type": "image_url", "image_url": {"url": "data:..."}}')
        urls.append(url)
        return {"type": "image"}
    raise HTTPException(400, f"content parts are of type text and image_url, got {shown(part.get('type'))}")


__all__ = ["Question", "check_options", "is_integer", "parse_body", "parse_messages", "parse_stops", "shown"]
