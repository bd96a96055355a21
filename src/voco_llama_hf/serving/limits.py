"""Bounds of what the server takes on, and the ASGI layer that turns requests away before they are read."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


DRAINED = 4  # times the bound of a request

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """
    Args:
        max_request_bytes (`int`): Bytes of a request, images included; more is answered with 413.
        max_pixels (`int`): Pixels of an image; more is answered with 413.
        max_images (`int`): Images of a request; more is answered with 400.
        max_tokens (`int`): Tokens of an answer; more is answered with 400.
        max_queue (`int`): Requests that are answered or wait; more is answered with 429.
        read_seconds (`float`): Seconds that a request may take to arrive; more is answered with 408.
    """

    max_request_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 16
    max_tokens: int = 1024
    max_queue: int = 64
    read_seconds: float = 30


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class LimitMiddleware:
    """
    Counts the requests that are under way and reads their bodies, up to the bounds. A request counts until its
    connection is done with, however it ends.
    """

    def __init__(self, app: Any, limits: Limits):
        self.app = app
        self.limits = limits
        self.under_way = 0

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.under_way >= self.limits.max_queue:
            message = f"{self.under_way} requests are under way, which is all that this server takes on: try again"
            return await refuse(send, 429, message, retry_after=1)
        self.under_way += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self.under_way -= 1

    async def _pass_on(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                body = await read_body(scope, receive, self.limits.max_request_bytes)
        except TimeoutError:
            return await refuse(send, 408, f"the request did not arrive within {self.limits.read_seconds:g} seconds")
        except OverflowError:
            message = f"the request is too large: at most {self.limits.max_request_bytes:,} bytes are read"
            return await refuse(send, 413, message)
        if body is None:
            return None  # the client has gone
        is_read = False

        async def replay() -> dict[str, Any]:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def read_body(scope: dict[str, Any], receive: Receive, max_bytes: int) -> bytes | None:
    """
    The body of a request, or `None` if the client went away.

    Raises:
        OverflowError: if it is larger than `max_bytes`.
    """
    announced = dict(scope["headers"]).get(b"content-length", b"0")
    if announced.isdigit() and int(announced) > DRAINED * max_bytes:
        raise OverflowError
    parts, size, more = [], 0, True
    # A little too much is read to its end and forgotten: a client that is still sending would not hear the answer
    while more and size <= DRAINED * max_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        if size <= max_bytes:
            parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    if size > max_bytes:
        raise OverflowError
    return b"".join(parts)


async def refuse(send: Send, status: int, message: str, retry_after: int | None = None) -> None:
    """Answers without the rest of the server."""
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    # What is left of the body is not read, so the connection cannot be used again
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


__all__ = ["LimitMiddleware", "Limits", "error_body"]
