"""Bounds of what the server takes on, and the ASGI layer that turns requests away before they are read."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any


DRAINED = 4  # times the bound of a request

# As ASGI has them
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


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
        stall_seconds (`float`): Seconds of it without a byte; more is answered with 408.
    """

    max_request_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    max_images: int = 16
    max_tokens: int = 1024
    max_queue: int = 64
    read_seconds: float = 30
    stall_seconds: float = 5


def error_body(status: int, message: str) -> dict[str, Any]:
    """An error as OpenAI's API writes it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


class LimitMiddleware:
    """
    Reads the bodies of requests, up to the bounds, and counts the requests that are under way. A request counts from
    when it is there, so that those that never arrive keep nobody out, until its connection is done with, however it
    ends.
    """

    def __init__(self, app: App, limits: Limits):
        self.app = app
        self.limits = limits
        self.under_way = 0
        self.arriving_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self._is_full():
            return await self._refuse_more(send)
        try:
            body = await self._read(scope, receive)
        except TimeoutError:
            return await refuse(send, 408, "the request did not arrive: it took too long")
        except OverflowError:
            message = f"the request is too large: at most {self.limits.max_request_bytes:,} bytes are read"
            return await refuse(send, 413, message)
        if body is None:
            return None  # the client has gone
        if self._is_full():
            return await self._refuse_more(send)
        self.under_way += 1
        again = replay(body, receive)
        del body  # which is not to wait for the answer too
        try:
            await self.app(scope, again, send)
        finally:
            self.under_way -= 1

    def _is_full(self) -> bool:
        limits = self.limits
        too_many = self.under_way >= limits.max_queue
        return too_many or self.arriving_bytes >= limits.max_queue * limits.max_request_bytes

    async def _refuse_more(self, send: Send) -> None:
        message = f"{self.under_way} requests are under way, which is all that this server takes on: try again"
        await refuse(send, 429, message, retry_after=1)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """
        The body of a request, or `None` if the client went away.

        Raises:
            OverflowError: if it is larger than `max_request_bytes`.
            TimeoutError: if it does not arrive.
        """
        max_bytes = self.limits.max_request_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > DRAINED * max_bytes:
            raise OverflowError
        parts: list[bytes] = []
        size, kept, more = 0, 0, True
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                # A little too much is read to its end and forgotten: a client that is still sending would not hear
                while more and size <= DRAINED * max_bytes:
                    async with asyncio.timeout(self.limits.stall_seconds):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= max_bytes:
                        parts.append(part)
                        kept += len(part)
                        self.arriving_bytes += len(part)
                    more = message.get("more_body", False)
        finally:
            self.arriving_bytes -= kept
        if size > max_bytes:
            raise OverflowError
        return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """What a request receives whose body was read already."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


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
