"""What tiles buy on scenes that cannot be read scaled down, and which way to spend VoCo tokens on them keeps more.

From the weights of the embedded checkpoint, on scenes of four times its pixels, five models are trained on the same
scenes for as many steps: one that reads them scaled down, and four of LLaVA-NeXT's kind that read four tiles and the
small picture of all of it, uncompressed, from one or five VoCo tokens of the whole image, or from one of every tile.
What an interrupted run has left is kept in the work folder, and more rounds go on from there.

    python benchmarks/tiles.py --output benchmarks/results/tiles_cpu.json --plot docs/source/images/tiles.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import datasets
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from voco_llama_hf.files import written_aside
from voco_llama_hf.scenes.evaluation import GROUPS, UNCOMPRESSED, ScenesResults, Scores
from voco_llama_hf.scenes.retention.report import write_record
from voco_llama_hf.scenes.retention.tiles import TileArm, TileStudy, make_arms, run_tile_study
from voco_llama_hf.scenes.scoring import add_bars, add_legend, add_levels, add_panels, percent


VISION_TOKENS = {False: 64, True: 336}  # scaled down, and of four tiles, the small picture and 16 newlines
SHOWN = ("all", "digit", "shape", "colour")


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every arm in a round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of which goes on from the one before.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Scenes of the test split to ask about.")] = 200,
    work_dir: Path = Path("runs") / "tiles",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to draw.")] = None,
) -> None:
    """Train, ask, and show."""
    datasets.disable_progress_bars()
    console = Console(width=132)
    study = TileStudy(work_dir, steps, rounds)
    arms = make_arms(1, study.num_tiles)
    results = run_tile_study(study, arms, "test", limit, report=console.rule)
    console.print(make_table(arms, results, study))
    if output is not None:
        recipe = study.recipe
        trained = {"steps": steps, "rounds": rounds, "batch_size": recipe.batch_size, "canvas": recipe.canvas}
        write_record(output, **trained, arms=arms, results=results)
    if plot is not None:
        with written_aside(plot) as part:
            draw(arms, results, study).savefig(part, dpi=150, format=plot.suffix[1:])


def count_tokens(arm: TileArm, reading: str, num_tiles: int) -> int:
    """What an image costs."""
    if reading == UNCOMPRESSED:
        return VISION_TOKENS[arm.tiled]
    return int(reading.removeprefix("k=")) * (num_tiles if arm.per_tile else 1)


def of_all_scenes(results: ScenesResults, scores: Scores) -> dict[str, float]:
    """Exact match by family, over sparse and dense scenes."""
    asked = results.num_questions
    totals = {group: sum(by_group[group] for by_group in asked.values()) for group in GROUPS}
    hits = {group: sum(scores[kind].get(group, 0.0) * asked[kind][group] for kind in scores) for group in GROUPS}
    return {group: hits[group] / totals[group] for group in GROUPS if totals[group]}


def rows(
    arms: tuple[TileArm, ...], results: dict[str, ScenesResults], num_tiles: int
) -> list[tuple[str, str, int, dict[str, float], float]]:
    """Arm, reading, tokens of an image, exact match by family, and that of the images of other scenes."""
    return [
        (arm.name, reading, count_tokens(arm, reading, num_tiles), of_all_scenes(one, scores), blind(one, reading))
        for arm in arms
        for one in [results[arm.name]]
        for reading, scores in one.accuracy.items()
    ]


def blind(results: ScenesResults, reading: str) -> float:
    return of_all_scenes(results, results.blind[reading])["all"]


def make_table(arms: tuple[TileArm, ...], results: dict[str, ScenesResults], study: TileStudy) -> Table:
    """Exact match in percent."""
    about = f"{study.steps * study.rounds} steps of {study.recipe.batch_size} images"
    table = Table(title=f"Scenes of {study.recipe.canvas.side} pixels, {about}: exact match in percent")
    for heading in ("trained on", "asked with", "tokens", *GROUPS, "images shuffled"):
        table.add_column(heading, justify="left" if heading in ("trained on", "asked with") else "right")
    last = ""
    for name, reading, tokens, scores, shuffled in rows(arms, results, study.num_tiles):
        if last not in ("", name):
            table.add_section()
        cells = (percent(scores.get(group)) for group in GROUPS)
        table.add_row("" if name == last else name, reading, str(tokens), *cells, percent(shuffled))
        last = name
    return table


def draw(arms: tuple[TileArm, ...], results: dict[str, ScenesResults], study: TileStudy) -> Figure:
    """A group of bars for all questions, and for those that need to see what is small."""
    found = rows(arms, results, study.num_tiles)
    figure = Figure(figsize=(13, 5), layout="constrained")
    (panel,) = add_panels(figure, [f"{study.steps * study.rounds} steps"], SHOWN)
    colours = {arm.name: f"C{i}" for i, arm in enumerate(arms)}
    for i, (name, _, tokens, scores, shuffled) in enumerate(found):
        first = found[i - 1][0] != name
        shares = [scores[group] for group in SHOWN]
        add_bars(panel, shares, i, len(found), colours[name], name if first else "_")
        add_levels(panel, [shuffled], i, len(found), None if i else "images shuffled")
        place = panel.patches[-len(SHOWN)]
        panel.annotate(
            str(tokens), (place.get_x() + place.get_width() / 2, 1), ha="center", fontsize=7, color="white", zorder=4
        )
    add_legend(figure, panel)
    return figure


if __name__ == "__main__":
    typer.run(main)
