"""Running the application: uvicorn, with time-outs for connections on which nothing arrives."""

import asyncio

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .limits import App


HEAD_SECONDS = 5.0  # that the head of a request may take to arrive
MAX_CONNECTIONS = 512
MAX_HEAD_BYTES = 32_768
SHUTDOWN_SECONDS = 5


class HeadTimeout(H11Protocol):
    """uvicorn's HTTP/1.1 closes connections that are idle between two requests, but not those that begin none."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_waiting()
        elif self.timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def build_server(app: App) -> uvicorn.Server:
    """
    A server for [`build_app`]'s application.

    Args:
        app (`Callable`): What answers.
    """
    config = uvicorn.Config(
        app,
        http=HeadTimeout,
        ws="none",
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)


__all__ = ["build_server"]
