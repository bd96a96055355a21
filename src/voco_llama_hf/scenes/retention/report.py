"""The table and the picture of a study: accuracy, and the share of it that compression kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ...files import written_aside
from ..evaluation import ScenesResults, retention
from ..still import FAMILIES
from .study import CAUSAL, UPPER


# Mean retention in percent: paper, Table 2 (MMB, GQA, VQAv2 and SEED) and Table 1
PAPER_VOCO = {1: 83.8, 2: 87.8, 4: 90.4, 8: 91.3, 16: 91.3, 32: 92.6, 64: 93.7, 128: 97.7}
PAPER_BASELINES = {"average pooling": 64.1, "q-former": 57.2}


@dataclass
class Row:
    """
    What one arm, asked in one way, got right.

    Args:
        arm (`str`): Name of the arm.
        reading (`str`): `"k=1"`, ..., `"causal"` or `"uncompressed"`.
        accuracy (`dict[str, list[float]]`): Exact match from 0 to 1 by family (and `"all"`), one number a seed.
        retention (`list[float]`):
            Share of what lies between lower and upper bound that was kept, over all questions, one number a seed.
            Upper bound: trained and asked with VoCo tokens in the sequence and nothing hidden; lower bound: the same
            model, restricted to one VoCo token (paper, Table 1).
    """

    arm: str
    reading: str
    accuracy: dict[str, list[float]]
    retention: list[float]


def make_rows(results: dict[str, list[ScenesResults]], difficulty: str) -> list[Row]:
    """Rows of the table, for one difficulty of the scenes."""
    upper = [result.accuracy[CAUSAL][difficulty]["all"] for result in results[UPPER.name]]
    lower = [result.accuracy["k=1"][difficulty]["all"] for result in results[UPPER.name]]
    rows = []
    for arm, by_seed in results.items():
        for reading in by_seed[0].accuracy:
            scores = [result.accuracy[reading][difficulty] for result in by_seed]
            name = "lower bound" if (arm, reading) == (UPPER.name, "k=1") else arm
            accuracy = {family: [score[family] for score in scores] for family in ("all", *FAMILIES)}
            bounds = zip(accuracy["all"], lower, upper, strict=True)
            rows.append(Row(name, reading, accuracy, [retention(*numbers) for numbers in bounds]))
    return rows


def percent(values: list[float]) -> str:
    """Mean and, of several seeds, standard deviation."""
    spread = f" ±{100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"


def print_rows(rows: list[Row], title: str, console: Console) -> None:
    """Prints the table, in percent."""
    table = Table(title=title)
    for heading in ("arm", "asked with"):
        table.add_column(heading, no_wrap=True)
    for heading in ("all", "retention", *FAMILIES):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = ""
    for row in rows:
        numbers = [row.accuracy["all"], row.retention, *(row.accuracy[family] for family in FAMILIES)]
        table.add_row("" if row.arm == shown else row.arm, row.reading, *map(percent, numbers))
        shown = row.arm
    console.print(table)


def to_markdown(rows: list[Row]) -> str:
    """The table as Markdown, in percent."""
    head = ("arm", "asked with", "exact match", "retention", *FAMILIES)
    lines = [f"| {' | '.join(head)} |", f"| --- | --- |{' ---: |' * (len(head) - 2)}"]
    for row in rows:
        numbers = [row.accuracy["all"], row.retention, *(row.accuracy[family] for family in FAMILIES)]
        lines.append(f"| {row.arm} | {row.reading} | {' | '.join(map(percent, numbers))} |")
    return "\n".join(lines) + "\n"


def make_curves(rows: list[Row]) -> dict[str, list[tuple[int, list[float]]]]:
    """Retention over the number of tokens, by arm."""
    curves: dict[str, list[tuple[int, list[float]]]] = {}
    for row in rows:
        if row.reading.startswith("k=") and row.arm != "lower bound":
            curves.setdefault(row.arm, []).append((int(row.reading.removeprefix("k=")), row.retention))
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
        spreads = [100 * stdev(value) if len(value) > 1 else 0 for value in values]
        style = "none" if len(ks) == 1 else "-"
        panel.errorbar(ks, centres, yerr=spreads, label=name, marker="o", linestyle=style, capsize=3)
    paper = {k: value for k, value in PAPER_VOCO.items() if k <= largest}
    panel.plot(paper.keys(), paper.values(), color="0.6", linestyle="--", marker=".", label="paper: VoCo-LLaMA")
    for (name, value), marker in zip(PAPER_BASELINES.items(), "xv", strict=True):
        panel.plot([1], [value], color="0.6", linestyle="none", marker=marker, label=f"paper: {name}")
    panel.axhline(100, color="0.8", linewidth=1, zorder=0)
    panel.set_xscale("log", base=2)
    panel.set_xticks(list(paper), list(map(str, paper)))
    panel.set(xlabel="VoCo tokens an image", ylabel="retention, %", title=title)
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    with written_aside(path) as part:
        figure.savefig(part, dpi=150, format=path.suffix[1:])
