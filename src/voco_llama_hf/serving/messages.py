"""What may stand in a chat completion request, checked before anything is computed."""

from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from ..modeling import VoCoLlamaProcessor
from .limits import Limits


# What would change the answer and is not done: better refused than ignored
REFUSED = ("audio", "chat_template_kwargs", "function_call", "functions", "generation_config", "prediction", "tools")
BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "frequency_penalty": (-0.99, 2.0),
}
MAX_STOPS = 4


@dataclass
class Question:
    """
    Args:
        messages (`list[dict]`): Messages for the chat template, with a part of type `"image"` for every image.
        urls (`list[str]`): Where the images are, in order.
    """

    messages: list[dict[str, Any]]
    urls: list[str]


def check_options(body: dict[str, Any], limits: Limits) -> None:
    """
    Raises:
        HTTPException: if an option is of the wrong type or out of bounds, or not supported.
    """
    if refused := [name for name in REFUSED if body.get(name)]:
        raise HTTPException(400, f"{refused[0]} is not supported")
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
    if seed is not None and not (is_integer(seed) and 0 <= seed < 2**32):
        raise HTTPException(400, f"seed must be an integer from 0 to {2**32 - 1}, got {shown(seed)}")
    if not isinstance(body.get("stream"), bool | None):
        raise HTTPException(400, "stream must be true or false")
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
    if stop is not None and not (
        isinstance(stop, list) and 1 <= len(stop) <= MAX_STOPS and all(isinstance(text, str) and text for text in stop)
    ):
        raise HTTPException(400, f"stop must be a string or a list of up to {MAX_STOPS} strings")
    if body.get("logit_bias"):
        raise HTTPException(400, "logit_bias is not supported")


def shown(value: Any) -> str:
    """A value in an error message, cut short."""
    return f"{value!r:.60}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def parse_messages(messages: Any, processor: VoCoLlamaProcessor, limits: Limits) -> Question:
    """
    Messages in OpenAI's format for the chat template.

    Raises:
        HTTPException: if they are none, hold what the model cannot read, or too many images.
    """
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, "messages must be a list of at least one message")
    urls: list[str] = []
    parsed = [parse_message(message, processor, urls) for message in messages]
    if len(urls) > limits.max_images:
        raise HTTPException(400, f"a request may have {limits.max_images} images, got {len(urls)}")
    return Question(parsed, urls)


def parse_message(message: Any, processor: VoCoLlamaProcessor, urls: list[str]) -> dict[str, Any]:
    """One message; the URLs of its images are added to `urls`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HTTPException(400, "a message is an object with a role and a content")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise HTTPException(400, "the content of a message is a string or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            for token in (processor.image_token, processor.video_token, processor.voco_token):
                if token in part["text"]:
                    raise HTTPException(400, f"{token} stands for an image: send images as parts of type image_url")
            parts.append({"type": "text", "text": part["text"]})
        elif part.get("type") == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str):
                raise HTTPException(400, 'an image is {"type": "image_url", "image_url": {"url": "data:..."}}')
            urls.append(url)
            parts.append({"type": "image"})
        else:
            raise HTTPException(400, f"content parts are of type text and image_url, got {shown(part.get('type'))}")
    return {"role": message["role"], "content": parts}


__all__ = ["Question", "check_options", "is_integer", "parse_messages", "shown"]
