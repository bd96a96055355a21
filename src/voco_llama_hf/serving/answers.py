"""An answer under way: tokens come from the thread that computes, text goes to the event loop."""

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..modeling import VoCoCache
from .sampling import Sampling


UNFINISHED = "\ufffd"  # what a tokenizer writes for a character that still lacks bytes


@dataclass(frozen=True)
class Picture:
    """
    An image of a request.

    Args:
        content_hash (`str`): What its compressed form is called.
        known ([`VoCoCache`], *optional*): Its compressed form, if it was in memory.
        pixels (`dict[str, torch.Tensor]`, *optional*): What it is compressed from, if it was not.
        num_tiles (`int`, *optional*, defaults to 1): Parts of it with VoCo tokens of their own.
    """

    content_hash: str
    known: VoCoCache | None = None
    pixels: dict[str, torch.Tensor] | None = None
    num_tiles: int = 1


@dataclass(frozen=True)
class Job:
    """
    A checked request.

    Args:
        input_ids (`list[int]`): Tokens of the prompt, `<voco>` tokens of its pictures among them.
        pictures (`list[Picture]`): Its images, in order.
        num_voco_tokens (`int`): VoCo tokens of each, or of each of their tiles.
        per_tile (`bool`): Which of both.
        sampling ([`Sampling`]): How its tokens are drawn.
        max_tokens (`int`): Longest answer, in tokens.
        stops (`Sequence[str]`): Texts that end the answer and are not part of it.
    """

    input_ids: list[int]
    pictures: list[Picture]
    num_voco_tokens: int
    per_tile: bool
    sampling: Sampling
    max_tokens: int
    stops: Sequence[str] = ()


class Answer:
    """
    To be made in the event loop, iterated over there, and cancelled by who does not want it any more.

    Args:
        job ([`Job`]): What is asked.
        tokenizer (`PreTrainedTokenizerBase`): Turns tokens into text.
        end_ids (`Collection[int]`): Tokens that end an answer.
    """

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int]):
        self.job = job
        self.caches: list[VoCoCache] = []
        self.cached_tokens = 0
        self.num_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self.has_failed = False
        self._end_ids = end_ids
        self._detokenizer, self._stop_text = Detokenizer(tokenizer), StopText(job.stops)
        self._cancelled = Event()
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[str]:
        """
        Raises:
            RuntimeError: if it could not be computed.
        """
        while (piece := await self._pieces.get()) is not None:
            yield piece
        if self.has_failed:
            raise RuntimeError("the answer could not be computed")

    def cancel(self) -> None:
        self._cancelled.set()

    # What the thread that computes calls

    @property
    def is_done(self) -> bool:
        """Whether no more tokens are wanted."""
        return self._cancelled.is_set() or self.finish_reason is not None or self.has_failed

    def push(self, token: int) -> None:
        """Takes the next token."""
        if self.is_done:
            return
        self.num_tokens += 1
        is_end = token in self._end_ids
        self._send(self._stop_text.push("" if is_end else self._detokenizer.push(token)))
        if is_end or self._stop_text.is_found:
            self._finish("stop")
        elif self.num_tokens >= self.job.max_tokens:
            self._finish("length")

    def fail(self) -> None:
        """Ends it with an error, unless it is complete."""
        if not self.is_done:
            self.has_failed = True
            self._send(None)

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._send(self._stop_text.push(self._detokenizer.flush()))
        self._send(self._stop_text.flush())
        self.finish_reason = "stop" if self._stop_text.is_found else reason
        self._send(None)

    def _send(self, piece: str | None) -> None:
        if piece != "":
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)


class Detokenizer:
    """Tokens to text, one at a time: what was given out does not change when more tokens come."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text

    def flush(self) -> str:
        """What is left at the end, with characters that stay unfinished."""
        text = self._new()
        self._read = len(self._ids)
        return text

    def _new(self) -> str:
        # Some tokens before the new ones: where a space belongs depends on them
        known, whole = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        return whole[len(known) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)  # type: ignore[return-value]


class StopText:
    """Text up to the first of some strings; what could be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        self.is_found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        if self.is_found or not text:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.is_found = True
            return self._held[: min(found)]
        longest = max(map(len, self._stops), default=1) - 1
        first = max(len(self._held) - longest, 0)
        kept = next((i for i in range(first, len(self._held)) if self._begins_stop(i)), len(self._held))
        text, self._held = self._held[:kept], self._held[kept:]
        return text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.is_found else self._held

    def _begins_stop(self, place: int) -> bool:
        return any(stop.startswith(self._held[place:]) for stop in self._stops)


__all__ = ["Answer", "Job", "Picture"]
