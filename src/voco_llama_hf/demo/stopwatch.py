"""Where the milliseconds of a call go: what the vision tower takes is measured, not assumed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..modeling import VoCoLlamaForConditionalGeneration


@dataclass
class Spent:
    """
    Args:
        vision_ms (`float`): Milliseconds in the vision tower and the projector.
        language_ms (`float`): Milliseconds in all the rest, which is the language model.
    """

    vision_ms: float = 0.0
    language_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.vision_ms + self.language_ms


class Stopwatch:
    """Clocks calls of a model. For one call at a time."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        self._vision_ms = self._entered = 0.0
        for part in (model.model.vision_tower, model.model.multi_modal_projector):
            part.register_forward_pre_hook(self._enter)
            part.register_forward_hook(self._leave)

    def _enter(self, *args: object) -> None:
        self._entered = clock()

    def _leave(self, *args: object) -> None:
        self._vision_ms += clock() - self._entered

    @contextmanager
    def measure(self) -> Iterator[Spent]:
        """What is yielded is filled in at the end."""
        spent, self._vision_ms = Spent(), 0.0
        start = clock()
        yield spent
        spent.vision_ms = self._vision_ms
        spent.language_ms = clock() - start - self._vision_ms


def clock() -> float:
    """Milliseconds; on an accelerator after all work that is still under way."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return 1000 * time.perf_counter()


__all__ = ["Spent", "Stopwatch"]
