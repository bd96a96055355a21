"""One way to score: questions are asked of a reader, in batches, and count for the groups that they belong to."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..files import written_aside
from .readers import Reader


Group = TypeVar("Group", bound=Hashable)

BARS = 0.8  # of the place that a group of bars has


@dataclass(frozen=True)
class Asked(Generic[Group]):
    """
    One question.

    Args:
        question, answer (`str`): As they were drawn.
        shown (`int`): Index of the image or video that it is asked about.
        groups (`tuple`): What it counts for.
    """

    question: str
    answer: str
    shown: int
    groups: tuple[Group, ...]


def score(
    reader: Reader, asked: Sequence[Asked[Group]], batch_size: int, description: str, progress: bool
) -> dict[Group, float]:
    """Exact match of the answers of `reader`, from 0 to 1, by group."""
    correct: defaultdict[Group, list[bool]] = defaultdict(list)
    for start in track(range(0, len(asked), batch_size), description=description, disable=not progress):
        batch = asked[start : start + batch_size]
        answers = reader([one.question for one in batch], [one.shown for one in batch])
        for one, answer in zip(batch, answers, strict=True):
            for group in one.groups:
                correct[group].append(answer == one.answer)
    return {group: sum(hits) / len(hits) for group, hits in correct.items()}


@dataclass
class Results(ABC):
    """
    Exact match on a data set.

    Args:
        split (`str`): Split that was evaluated.
    """

    split: str

    @abstractmethod
    def table(self) -> Table:
        """The results in percent."""

    @abstractmethod
    def draw(self, figure: Figure) -> None:
        """Draws the results as bars, by family."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the results as JSON."""
        with written_aside(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def print(self, console: Console | None = None) -> None:
        """Prints the results as a table, in percent."""
        (console or Console()).print(self.table())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the results into a picture, in the format that its name says."""
        figure = Figure(layout="constrained")
        self.draw(figure)
        with written_aside(path) as part:
            figure.savefig(part, dpi=150, format=Path(path).suffix[1:])


def percent(share: float | None) -> str:
    """A cell of a table; nothing where nothing was asked."""
    return "" if share is None else f"{100 * share:.1f}"


def add_panels(figure: Figure, titles: Sequence[str], groups: Sequence[str]) -> list[Axes]:
    """One panel a title, one above the other, with a place for every group."""
    panels = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, loc="left")
        panel.set_ylabel("exact match, %")
        panel.set_ylim(0, 101)
        panel.grid(axis="y", color="0.9", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(groups)), groups)
    return panels


def add_bars(panel: Axes, shares: Sequence[float], i: int, number: int, colour: str, label: str) -> None:
    """The `i`-th of `number` bars of every group."""
    width = BARS / number
    panel.bar(
        _places(len(shares), i, number), [100 * s for s in shares], width * 0.92, color=colour, label=label, zorder=2
    )


def add_levels(panel: Axes, shares: Sequence[float], i: int, number: int, label: str | None) -> None:
    """A line over the `i`-th of `number` bars of every group, or over all of them if `number` is 1."""
    width = BARS / number
    for group, (place, share) in enumerate(zip(_places(len(shares), i, number), shares, strict=True)):
        ends = place - width / 2, place + width / 2
        panel.hlines(100 * share, *ends, color="black", linewidth=1.5, label=None if group else label, zorder=3)


def add_legend(figure: Figure, panel: Axes) -> None:
    """What the bars of all panels mean, above them."""
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)), frameon=False)


def _places(num_groups: int, i: int, number: int) -> list[float]:
    return [group + (i + 0.5) * BARS / number - BARS / 2 for group in range(num_groups)]
