"""The table and the picture of a study: accuracy, and the share of it that compression kept."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import date
from math import isnan
from pathlib import Path
from statistics import mean

import numpy as np
import torch
import transformers
import trl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ...benchmark.report import Sheet
from ...benchmark.results import hardware
from ...files import written_aside
from ..evaluation import ScenesResults, retention
from ..still import DIFFICULTIES, FAMILIES
from .describing import OBJECTS
from .following import Curve
from .study import CAUSAL, UPPER, Courses


RETAINED = (OBJECTS, "all")
NOTHING = float("nan")  # was asked, of few scenes
HEADINGS = ("objects", "retention", "questions", "retention", *FAMILIES)
# Mean retention in percent: paper, Table 2 (MMB, GQA, VQAv2 and SEED) and Table 1
PAPER_VOCO = {1: 83.8, 2: 87.8, 4: 90.4, 8: 91.3, 16: 91.3, 32: 92.6, 64: 93.7, 128: 97.7}
PAPER_BASELINES = {"average pooling": 64.1, "q-former": 57.2}


def origin() -> dict[str, object]:
    """Date, command, hardware and versions."""
    return {
        "date": date.today().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def one_token_sheet(title: str, heading: str, results: dict[str, list[ScenesResults]]) -> Sheet:
    """
    Objects that are named and answers that are right from one VoCo token, in percent, of sparse and dense scenes.

    Args:
        title (`str`): Of the table.
        heading (`str`): Of the arms.
        results (`dict[str, list[ScenesResults]]`): By arm, one a seed.
    """
    columns = [(difficulty, group) for difficulty in DIFFICULTIES for group in RETAINED]
    rows = []
    for arm, by_seed in results.items():
        scores = [one.accuracy["k=1"] for one in by_seed]
        rows.append(
            [arm, *(percent([s[difficulty].get(group, NOTHING) for s in scores]) for difficulty, group in columns)]
        )
    headings = [f"{'objects' if group == OBJECTS else 'questions'}, {difficulty}" for difficulty, group in columns]
    return Sheet(title, [heading, *headings], rows)


def write_record(path: Path, **figures: object) -> None:
    """Writes figures, dataclasses among them, as JSON below their [`origin`]."""
    with written_aside(path) as part:
        part.write_text(json.dumps({**origin(), **figures}, indent=2, default=asdict) + "\n")


def save_report(path: Path, markdown: str, **figures: object) -> None:
    """Writes figures as [`write_record`] does, or what they are in Markdown if the name ends so."""
    if path.suffix.lower() != ".md":
        write_record(path, **figures)
        return
    with written_aside(path) as part:
        part.write_text(markdown)


@dataclass
class Comparison:
    """
    What a study found.

    Args:
        size (`str`): Name of its [`Size`].
        steps (`int`): Steps of every arm.
        split, limit: What was asked about.
        results (`dict[str, list[ScenesResults]]`): By arm, one a seed.
        courses ([`Courses`]): How the arms were trained.
    """

    size: str
    steps: int
    split: str
    limit: int
    results: dict[str, list[ScenesResults]]
    courses: Courses

    @property
    def seeds(self) -> int:
        return len(self.results[UPPER.name])

    @property
    def rows(self) -> dict[str, list[Row]]:
        """By difficulty."""
        return {difficulty: make_rows(self.results, difficulty) for difficulty in DIFFICULTIES}

    @property
    def title(self) -> str:
        seeds = f"{self.seeds} seed{'' if self.seeds == 1 else 's'}"
        return f"{self.split} split, {self.limit} scenes, {self.steps} steps, {seeds}"

    def print(self, console: Console) -> None:
        """Prints the tables, in percent."""
        for difficulty, rows in self.rows.items():
            print_rows(rows, f"{difficulty} scenes: exact match and retention in percent ({self.title})", console)

    def save(self, path: Path) -> None:
        """Writes the results as JSON, or the tables as Markdown if the name ends so."""
        markdown = "\n".join(f"## {name} scenes\n\n{to_markdown(rows)}" for name, rows in self.rows.items())
        save_report(path, markdown, **self.to_dict())

    def to_dict(self) -> dict[str, object]:
        some = self.results[UPPER.name][0]
        return {
            "size": self.size,
            "split": self.split,
            "limit": self.limit,
            "num_questions": {name: counts["all"] for name, counts in some.num_questions.items()},
            "steps": self.steps,
            "seeds": self.seeds,
            "rows": self.rows,
            **asdict(self.courses),
        }

    def plot(self, path: Path) -> None:
        """Draws retention of dense scenes, and the courses of the trainings into a second picture beside it."""
        plot_rows(self.rows["dense"], f"dense scenes ({self.title})", path)
        plot_curves(self.courses.curves, training_picture(path))


def training_picture(path: Path) -> Path:
    """Where the courses of the trainings are drawn, beside the picture of the results."""
    return path.with_stem(f"{path.stem}_training")


@dataclass
class Row:
    """
    What one arm, asked in one way, got right.

    Args:
        arm (`str`): Name of the arm.
        reading (`str`): `"k=1"`, ..., `"causal"` or `"uncompressed"`.
        accuracy (`dict[str, list[float]]`):
            From 0 to 1, one number a seed: share of the objects that a description names (`"objects"`), and exact
            match of answers by family (and `"all"`).
        retention (`dict[str, list[float]]`):
            Of `"objects"` and `"all"`, share of what lies between lower and upper bound that was kept, one number a
            seed. Upper bound: trained and asked with VoCo tokens in the sequence and nothing hidden; lower bound: the
            same model, restricted to one VoCo token (paper, Table 1).
    """

    arm: str
    reading: str
    accuracy: dict[str, list[float]]
    retention: dict[str, list[float]]


def make_rows(results: dict[str, list[ScenesResults]], difficulty: str) -> list[Row]:
    """Rows of the table, for one difficulty of the scenes."""
    bounds = [
        (result.accuracy["k=1"][difficulty], result.accuracy[CAUSAL][difficulty]) for result in results[UPPER.name]
    ]
    rows = []
    for arm, by_seed in results.items():
        for reading in by_seed[0].accuracy:
            scores = [result.accuracy[reading][difficulty] for result in by_seed]
            name = "lower bound" if (arm, reading) == (UPPER.name, "k=1") else arm
            accuracy = {
                group: [score.get(group, NOTHING) for score in scores] for group in (OBJECTS, "all", *FAMILIES)
            }
            kept = {
                group: [
                    retention(*(numbers.get(group, NOTHING) for numbers in (score, lower, upper)))
                    for score, (lower, upper) in zip(scores, bounds, strict=True)
                ]
                for group in RETAINED
            }
            rows.append(Row(name, reading, accuracy, kept))
    return rows


def percent(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation; nothing of what was not asked."""
    if any(map(isnan, values)):
        return ""
    spread = f" ±{100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def cells(row: Row) -> list[str]:
    """What stands under [`HEADINGS`], in percent."""
    kept = [numbers for group in RETAINED for numbers in (row.accuracy[group], row.retention[group])]
    return list(map(percent, [*kept, *(row.accuracy[family] for family in FAMILIES)]))


def print_rows(rows: list[Row], title: str, console: Console) -> None:
    """Prints the table, in percent."""
    table = Table(title=title)
    for heading in ("arm", "asked with"):
        table.add_column(heading, no_wrap=True)
    for heading in HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    shown = ""
    for row in rows:
        table.add_row("" if row.arm == shown else row.arm, row.reading, *cells(row))
        shown = row.arm
    console.print(table)


def to_markdown(rows: list[Row]) -> str:
    """The table as Markdown, in percent."""
    head = ("arm", "asked with", *HEADINGS)
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for row in rows:
        lines.append(f"| {row.arm} | {row.reading} | {' | '.join(cells(row))} |")
    return "\n".join(lines) + "\n"


def make_curves(rows: list[Row]) -> dict[str, list[tuple[int, list[float]]]]:
    """Retention of the objects over the number of tokens, by arm."""
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        if row.reading.startswith("k=") and row.arm != "lower bound":
            curves.setdefault(row.arm, []).append((int(row.reading.removeprefix("k=")), row.retention[OBJECTS]))
    return curves


def plot_rows(rows: list[Row], title: str, path: Path) -> None:
    """Draws retention over the number of VoCo tokens, with the baselines and the paper's figures."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    panel = figure.subplots()
    curves = make_curves(rows)
    largest = max(k for points in curves.values() for k, _ in points)
    for name, points in curves.items():
        ks, values = zip(*points)
        centres = [100 * mean(value) for value in values]
        spreads = [100 * np.std(value, ddof=1) if len(value) > 1 else 0 for value in values]
        style = "none" if len(ks) == 1 else "-"
        panel.errorbar(ks, centres, yerr=spreads, label=name, marker="o", linestyle=style, capsize=3)
    paper = {k: value for k, value in PAPER_VOCO.items() if k <= largest}
    panel.plot(paper.keys(), paper.values(), color="0.6", linestyle="--", marker=".", label="paper: VoCo-LLaMA")
    for (name, value), marker in zip(PAPER_BASELINES.items(), "xv", strict=True):
        panel.plot([1], [value], color="0.6", linestyle="none", marker=marker, label=f"paper: {name}")
    panel.axhline(100, color="0.8", linewidth=1, zorder=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(paper), list(map(str, paper)))
    panel.set(xlabel="VoCo tokens an image", ylabel="retention of the objects, %", title=title)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    with written_aside(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])


def plot_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """
    Draws what every arm makes of the validation split as it is trained, loss and exact match: the mean over seeds, and
    from the least to the most.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for i, (name, by_seed) in enumerate(curves.items()):
        steps = [point.step for point in by_seed[0]]
        losses = [[point.loss for point in curve] for curve in by_seed]
        shares = [[100 * point.exact_match for point in curve] for curve in by_seed]
        for panel, courses in zip(panels, (losses, shares), strict=True):
            across = list(zip(*courses, strict=True))
            panel.plot(steps, list(map(mean, across)), label=name, color=f"C{i}", marker=".")
            panel.fill_between(steps, list(map(min, across)), list(map(max, across)), color=f"C{i}", alpha=0.15, lw=0)
    panels[0].set(xlabel="steps", ylabel="validation loss")
    panels[1].set(xlabel="steps", ylabel="exact match, dense scenes, validation, %")
    for panel in panels:
        panel.grid(axis="y", color="0.9", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    with written_aside(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])
