"""Results of tasks at each number of VoCo tokens, between what can be had with all vision tokens and with none."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from ...benchmark.report import Sheet
from ...files import written_aside
from ...hub.card import NUM_TEXT_TOKENS, format_cost
from ...hub.cost import ImageCost


PANEL_COLUMNS = 3


@dataclass(frozen=True)
class TaskInfo:
    """
    What was asked.

    Args:
        metric (`str`): The metric of the tables, as in `"exact_match"`.
        num_samples (`int`): Questions.
        dataset, config, split (`str`, *optional*): Where they are from: a data set of the Hub, and which part of it.
    """

    metric: str
    num_samples: int
    dataset: str | None = None
    config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class TaskScores:
    """
    Args:
        metrics (`dict[str, float]`): All metrics of the task, as lmms-eval gives them.
        seconds (`float`, *optional*): Seconds a question, from the pixels to the answer, of those answered last.
        images_read, images_reused (`int`): Images and frames that the vision tower saw, and need not see again.
    """

    metrics: dict[str, float]
    seconds: float | None
    images_read: int
    images_reused: int


@dataclass(frozen=True)
class ReadingScores:
    """
    One way to read the images: a row of the tables.

    Args:
        num_voco_tokens (`int`, *optional*): VoCo tokens of an image; `None` for all vision tokens.
        cost ([`ImageCost`], *optional*): What an image costs, counted from the configuration.
        tasks (`dict[str, TaskScores]`): By task.
    """

    num_voco_tokens: int | None
    cost: ImageCost | None
    tasks: dict[str, TaskScores]


@dataclass
class LmmsResults:
    """
    Results of lmms-eval.

    Args:
        tasks (`dict[str, TaskInfo]`): By name of the task.
        readings (`dict[str, ReadingScores]`): By name: the upper bound, each number of VoCo tokens, the lower bound.
        upper, lower (`str`): Names of the bounds among `readings`.
        lmms_eval_version (`str`): As it says.
        limit (`int`, *optional*): Questions that were asked at most of a task.
    """

    tasks: dict[str, TaskInfo]
    readings: dict[str, ReadingScores]
    upper: str
    lower: str
    lmms_eval_version: str
    limit: int | None = None
    suite: str = field(default="lmms", init=False)

    @property
    def compressed(self) -> dict[str, ReadingScores]:
        """The readings between the bounds."""
        return {name: reading for name, reading in self.readings.items() if name not in (self.upper, self.lower)}

    def value(self, reading: str, task: str) -> float:
        """A result by the metric of the tables."""
        return self.readings[reading].tasks[task].metrics[self.tasks[task].metric]

    def retention(self, reading: str, task: str) -> float:
        """(result - lower bound) / (upper bound - lower bound); not a number where the bounds are the same."""
        lower, upper = self.value(self.lower, task), self.value(self.upper, task)
        return (self.value(reading, task) - lower) / (upper - lower) if upper != lower else math.nan

    def mean_retention(self, reading: str) -> float:
        """Mean over the tasks that tell the bounds apart."""
        shares = [share for task in self.tasks if not math.isnan(share := self.retention(reading, task))]
        return sum(shares) / len(shares) if shares else math.nan

    def is_share(self, task: str) -> bool:
        """Whether a metric goes from 0 to 1: it is shown in percent."""
        return all(0 <= self.value(reading, task) <= 1 for reading in self.readings)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the results as JSON, or the tables as Markdown into a file that ends with `.md`."""
        with written_aside(path) as part:
            if Path(path).suffix.lower() == ".md":
                part.write_text(self.to_markdown())
            else:
                part.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, object]:
        """All of it for JSON, with the retention."""
        retention = {
            name: {**{task: number(self.retention(name, task)) for task in self.tasks}, "mean": number(mean)}
            for name in self.compressed
            for mean in [self.mean_retention(name)]
        }
        return {**asdict(self), "retention": retention}

    def sheets(self) -> list[Sheet]:
        """The tables: results (Tables 1 and 4 of the paper), retention (Tables 1 and 2), costs (Table 7)."""
        tasks = list(self.tasks)
        units = [f"{task} ({self.tasks[task].metric})" for task in tasks]
        results = [
            [name, *(self._shown(self.value(name, task), task) for task in tasks), self._percent_mean(name)]
            for name in self.readings
        ]
        shares = [
            [name, *(percent(self.retention(name, task)) for task in tasks), self._percent_mean(name)]
            for name in self.compressed
        ]
        costs = [
            [name, *([""] * 4 if reading.cost is None else format_cost(reading.cost)), *self._spent(reading)]
            for name, reading in self.readings.items()
        ]
        asked = ", ".join(f"{info.num_samples:,} of {task}" for task, info in self.tasks.items())
        return [
            Sheet(f"Results: {asked}", ["images read from", *units, "mean retention"], results),
            Sheet("Retention between the bounds, percent", ["images read from", *tasks, "mean"], shares),
            Sheet(
                f"What an image costs, and a question of {NUM_TEXT_TOKENS} tokens",
                [
                    "images read from", "positions", "keys and values", "FLOPs an image, once", "FLOPs a question",
                    "seconds a question", "images read", "reused",
                ],
                costs,
            ),
        ]  # fmt: skip

    def _shown(self, value: float, task: str) -> str:
        return percent(value) if self.is_share(task) else f"{value:.1f}"

    def _percent_mean(self, name: str) -> str:
        if name == self.lower:
            return percent(0.0)
        return percent(1.0) if name == self.upper else percent(self.mean_retention(name))

    def _spent(self, reading: ReadingScores) -> list[str]:
        scores = reading.tasks.values()
        known = [one.seconds for one in scores if one.seconds is not None]
        seconds = f"{sum(known) / len(known):.3g}" if known else "-"
        return [
            seconds,
            f"{sum(s.images_read for s in scores):,}",
            f"{sum(s.images_reused for s in scores):,}",
        ]

    def print(self, console: Console) -> None:
        """Prints the tables."""
        for sheet in self.sheets():
            sheet.print(console)

    def to_markdown(self) -> str:
        """The tables in Markdown."""
        return "\n".join(f"{sheet.title}:\n\n{sheet.markdown_table()}\n" for sheet in self.sheets())

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws results and mean retention over the number of VoCo tokens, in the format that the name says."""
        panels = len(self.tasks) + 1
        columns = min(PANEL_COLUMNS, panels)
        rows = math.ceil(panels / columns)
        figure = Figure(layout="constrained", figsize=(4.2 * columns, 3.2 * rows))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.set_visible(False)
        counts = [reading.num_voco_tokens or 0 for reading in self.compressed.values()]
        for axis, task in zip(axes, self.tasks):
            self._draw_task(axis, task, counts)
        axis = axes[panels - 1]
        axis.plot(counts, [100 * self.mean_retention(name) for name in self.compressed], "o-", color="C1")
        axis.axhline(100, color="0.4", linestyle="--", linewidth=1)
        axis.axhline(0, color="0.4", linestyle=":", linewidth=1)
        finish(axis, "mean retention", "%", counts)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        with written_aside(path) as part:
            figure.savefig(part, dpi=150, format=Path(path).suffix[1:])

    def _draw_task(self, axis: Axes, task: str, counts: Sequence[int]) -> None:
        scale = 100 if self.is_share(task) else 1
        axis.axhline(scale * self.value(self.upper, task), color="0.4", linestyle="--", linewidth=1, label=self.upper)
        values = [scale * self.value(name, task) for name in self.compressed]
        axis.plot(counts, values, "o-", color="C0", label="compressed")
        axis.axhline(scale * self.value(self.lower, task), color="0.4", linestyle=":", linewidth=1, label=self.lower)
        metric = self.tasks[task].metric.replace("_", " ")
        finish(axis, task, f"{metric}, %" if scale == 100 else metric, counts)


def finish(axis: Axes, title: str, unit: str, counts: Sequence[int]) -> None:
    """What all panels have."""
    axis.set_title(title, loc="left")
    axis.set_ylabel(unit)
    axis.set_xlabel("VoCo tokens an image")
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.grid(axis="y", color="0.9", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)


def percent(share: float) -> str:
    """A cell in percent; a dash where there is no number."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def number(value: float) -> float | None:
    """What JSON has: no NaN."""
    return None if math.isnan(value) else value


__all__ = ["LmmsResults", "ReadingScores", "TaskInfo", "TaskScores"]
