"""How well a checkpoint reads the scenes: exact match of short answers, by difficulty, family and number of tokens."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from ..files import written_aside
from .readers import Reader, preprocess, uncompressed_reader, voco_reader
from .still import DIFFICULTIES, FAMILIES, make_scenes


Scores = dict[str, dict[str, float]]

UNCOMPRESSED = "uncompressed"


@dataclass
class ScenesResults:
    """
    Exact match on the scenes.

    Args:
        split (`str`): Split that was evaluated.
        num_scenes (`int`): Number of images.
        num_questions (`dict[str, dict[str, int]]`): Number of questions by difficulty and family (and `"all"`).
        accuracy (`dict[str, dict[str, dict[str, float]]]`):
            Exact match from 0 to 1 by mode (`"k=1"`, ..., `"uncompressed"`), difficulty and family (and `"all"`).
        blind (`dict[str, dict[str, dict[str, float]]]`):
            The same where every question is asked about the image of another scene of the same difficulty.
    """

    split: str
    num_scenes: int
    num_questions: dict[str, dict[str, int]]
    accuracy: dict[str, Scores]
    blind: dict[str, Scores]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the results as JSON."""
        with written_aside(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")


def evaluate_scenes(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    split: str = "test",
    num_voco_tokens: tuple[int, ...] = (1, 2, 4, 8),
    include_uncompressed: bool = True,
    shuffled: bool = True,
    batch_size: int = 128,
    limit: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> ScenesResults:
    """
    Asks every question of a split on its own and compares the greedy answers with the true ones.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            Model to evaluate.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the scenes data set.
        num_voco_tokens (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 4, 8)`):
            Numbers of VoCo tokens to evaluate; each image is compressed once for each.
        include_uncompressed (`bool`, *optional*, defaults to `True`):
            Whether to evaluate the same weights as a LLaVA that reads all vision tokens.
        shuffled (`bool`, *optional*, defaults to `True`):
            Whether to measure the blind level too, with the images of other scenes.
        batch_size (`int`, *optional*, defaults to 128):
            Questions answered at a time.
        limit (`int`, *optional*, defaults to 1000):
            Number of scenes, about half of them dense.
        seed (`int`, *optional*, defaults to 0):
            Seed of the scenes.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`ScenesResults`]
    """
    scenes = make_scenes(split, limit, seed=seed)
    pixel_values = preprocess(processor, scenes)
    readers = {f"k={k}": voco_reader(model, processor, pixel_values, k) for k in num_voco_tokens}
    if include_uncompressed:
        readers[UNCOMPRESSED] = uncompressed_reader(model, processor, pixel_values)
    return score_readers(readers, scenes, split, shuffled, batch_size, progress)


def score_readers(
    readers: dict[str, Reader],
    scenes: Dataset,
    split: str,
    shuffled: bool = True,
    batch_size: int = 128,
    progress: bool = True,
) -> ScenesResults:
    """
    What [`evaluate_scenes`] does, for readers of any kind.

    Args:
        readers (`dict[str, Reader]`): Readers of the images of `scenes`, by mode.
        scenes ([`~datasets.Dataset`]): Rows of [`make_scenes`].
        split (`str`): Their split.
        shuffled (`bool`, *optional*, defaults to `True`): Whether to measure the blind level too.
        batch_size (`int`, *optional*, defaults to 128): Questions answered at a time.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        [`ScenesResults`]
    """
    own, other = list(range(len(scenes))), _other_scenes(list(scenes["difficulty"]))
    accuracy, blind = {}, {}
    for mode, reader in readers.items():
        accuracy[mode] = _score(reader, scenes, own, batch_size, f"{split}, {mode}", progress)
        if shuffled:
            blind[mode] = _score(reader, scenes, other, batch_size, f"{split}, {mode}, shuffled", progress)
    num_questions = {name: dict.fromkeys((*FAMILIES, "all"), 0) for name in DIFFICULTIES}
    for scene in scenes.select_columns(["difficulty", "families"]):
        for family in scene["families"]:
            num_questions[scene["difficulty"]][family] += 1
            num_questions[scene["difficulty"]]["all"] += 1
    return ScenesResults(split, len(scenes), num_questions, accuracy, blind)


def _other_scenes(difficulties: list[str]) -> list[int]:
    """For each scene the next one of its difficulty, in a circle."""
    others = list(range(len(difficulties)))
    for name in DIFFICULTIES:
        members = [i for i, difficulty in enumerate(difficulties) if difficulty == name]
        for here, there in zip(members, members[1:] + members[:1], strict=True):
            others[here] = there
    return others


def _score(
    reader: Reader, scenes: Dataset, image_of: list[int], batch_size: int, description: str, progress: bool
) -> Scores:
    """Exact match by difficulty and family of all questions, those of scene i asked about image `image_of[i]`."""
    asked = [
        (scene["difficulty"], family, question, answer, image_of[i])
        for i, scene in enumerate(scenes.remove_columns("image"))
        for family, question, answer in zip(scene["families"], scene["questions"], scene["answers"], strict=True)
    ]
    correct = defaultdict(list)
    starts = range(0, len(asked), batch_size)
    for start in track(starts, description=description, disable=not progress):
        difficulties, families, questions, answers, images = zip(*asked[start : start + batch_size], strict=True)
        predictions = reader(list(questions), list(images))
        for row in zip(difficulties, families, predictions, answers, strict=True):
            difficulty, family, prediction, answer = row
            correct[difficulty, family].append(prediction == answer)
            correct[difficulty, "all"].append(prediction == answer)
    return {
        name: {
            family: sum(correct[name, family]) / len(correct[name, family])
            for family in (*FAMILIES, "all")
            if correct[name, family]
        }
        for name in DIFFICULTIES
    }


def retention(accuracy: float, lower: float, upper: float) -> float:
    """The share of what lies between two bounds (paper, Table 1); NaN where nothing does."""
    return (accuracy - lower) / (upper - lower) if upper != lower else float("nan")


def print_results(results: ScenesResults, console: Console | None = None) -> None:
    """Prints the results as a table, in percent."""
    table = Table(
        title=f"Exact match on the {results.split} split ({results.num_scenes} scenes), percent",
        caption="shuffled: every question asked about the image of another scene",
    )
    for heading in ("difficulty", "image read from"):
        table.add_column(heading, no_wrap=True)
    for family in ("all", *FAMILIES):
        table.add_column(family, justify="right")
    for difficulty in DIFFICULTIES:
        for name, modes in (("", results.accuracy), (", shuffled", results.blind)):
            for mode, scores in modes.items():
                cells = [scores[difficulty].get(family) for family in ("all", *FAMILIES)]
                numbers = ["" if cell is None else f"{100 * cell:.1f}" for cell in cells]
                table.add_row(difficulty, mode + name, *numbers, style="dim" if name else None)
        table.add_section()
    (console or Console()).print(table)


def plot_results(results: ScenesResults, path: str | os.PathLike) -> None:
    """Draws the results as a bar chart: one panel a difficulty, one group of bars a family."""
    from matplotlib.figure import Figure

    groups = ("all", *FAMILIES)
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(len(DIFFICULTIES), 1, sharex=True)
    width = 0.8 / len(results.accuracy)
    for panel, (difficulty, (low, high)) in zip(panels, DIFFICULTIES.items(), strict=True):
        for i, (mode, scores) in enumerate(results.accuracy.items()):
            places = [group + (i + 0.5) * width - 0.4 for group in range(len(groups))]
            heights = [100 * scores[difficulty].get(family, 0.0) for family in groups]
            colour = "0.55" if mode == UNCOMPRESSED else f"C{i}"
            panel.bar(places, heights, width * 0.92, color=colour, label=mode, zorder=2)
            if mode in results.blind:
                level = [100 * results.blind[mode][difficulty].get(family, 0.0) for family in groups]
                panel.hlines(
                    level,
                    [place - width / 2 for place in places],
                    [place + width / 2 for place in places],
                    color="black",
                    linewidth=1.5,
                    label="images shuffled" if i == 0 else None,
                    zorder=3,
                )
        panel.set_title(f"{difficulty}: {low} to {high} objects", loc="left")
        panel.set_ylabel("exact match, %")
        panel.set_ylim(0, 101)
        panel.grid(axis="y", color="0.9", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(groups)), groups)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with written_aside(path) as part:
        figure.savefig(part, dpi=150, format=Path(path).suffix[1:])
