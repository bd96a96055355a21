"""How well a checkpoint understands what happens in a video: with all frames, with one, and out of order."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, ProcessorMixin

from ..files import written_aside
from ..modeling import VoCoCache
from .moving import CHANCE, NUM_FRAMES, STILL, TEMPORAL_FAMILIES, make_clips
from .readers import decode_answers, make_prompts


MAX_ANSWER_TOKENS = 16
TEMPORAL = "temporal"  # all questions that one frame cannot answer
ALL_FRAMES, ONE_FRAME, OUT_OF_ORDER = READINGS = ("all frames", "one frame", "out of order")
GROUPS = (TEMPORAL, *TEMPORAL_FAMILIES, STILL)


@dataclass
class VideoResults:
    """
    Exact match on the moving scenes.

    Args:
        split (`str`): Split that was evaluated.
        num_clips (`int`): Number of videos.
        num_questions (`dict[str, int]`): Number of questions by family (and `"temporal"`, of all but `"still"`).
        accuracy (`dict[str, dict[str, dict[str, float]]]`):
            Exact match from 0 to 1 by number of VoCo tokens a frame (`"k=2"`), frames that were shown (`"all frames"`,
            `"one frame"`, drawn at random, or all `"out of order"`) and family.
    """

    split: str
    num_clips: int
    num_questions: dict[str, int]
    accuracy: dict[str, dict[str, dict[str, float]]]

    def save(self, path: str | os.PathLike) -> None:
        """Writes the results as JSON."""
        with written_aside(path) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")


def evaluate_videos(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    split: str = "test",
    num_voco_tokens: tuple[int, ...] = (2,),
    batch_size: int = 64,
    limit: int = 300,
    seed: int = 0,
    progress: bool = True,
) -> VideoResults:
    """
    Asks every question of a split on its own and compares the greedy answers with the true ones.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            Model to evaluate.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
        split (`str`, *optional*, defaults to `"test"`):
            Split of the moving scenes.
        num_voco_tokens (`tuple[int, ...]`, *optional*, defaults to `(2,)`):
            Numbers of VoCo tokens a frame to evaluate; each frame is compressed once for each.
        batch_size (`int`, *optional*, defaults to 64):
            Questions answered at a time.
        limit (`int`, *optional*, defaults to 300):
            Number of videos.
        seed (`int`, *optional*, defaults to 0):
            Seed of the moving scenes.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        [`VideoResults`]
    """
    clips = make_clips(split, limit, seed)
    shown = choose_frames(limit, seed)
    frames = [frame for images in clips["images"] for frame in images]
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    for k in num_voco_tokens:
        pixels = processor.iter_pixel_values(frames)
        cache = model.compress(pixels, num_voco_tokens=k, show_progress=progress)
        accuracy[f"k={k}"] = {
            reading: _score(
                model, processor, cache, clips, indices, batch_size, f"{split}, k={k}, {reading}", progress
            )
            for reading, indices in shown.items()
        }
    families = [family for families in clips["families"] for family in families]
    num_questions = {TEMPORAL: len(families) - families.count(STILL)}
    num_questions |= {family: families.count(family) for family in (*TEMPORAL_FAMILIES, STILL)}
    return VideoResults(split, limit, num_questions, accuracy)


def choose_frames(num_clips: int, seed: int) -> dict[str, list[list[int]]]:
    """Indices of the frames of each video that are shown, among the frames of all, by reading."""
    rng = np.random.default_rng(seed)
    in_order = np.arange(num_clips * NUM_FRAMES).reshape(num_clips, NUM_FRAMES)
    orders = np.stack([rng.permutation(NUM_FRAMES) for _ in range(num_clips)])
    return {
        ALL_FRAMES: in_order.tolist(),
        ONE_FRAME: np.take_along_axis(in_order, orders[:, :1], 1).tolist(),
        OUT_OF_ORDER: np.take_along_axis(in_order, orders, 1).tolist(),
    }


def _score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    cache: VoCoCache,
    clips: Dataset,
    shown: list[list[int]],
    batch_size: int,
    description: str,
    progress: bool,
) -> dict[str, float]:
    """Exact match by family."""
    asked = [
        (family, question, answer, shown[i])
        for i, clip in enumerate(clips.remove_columns("images"))
        for family, question, answer in zip(clip["families"], clip["questions"], clip["answers"], strict=True)
    ]
    correct = defaultdict(list)
    for start in track(range(0, len(asked), batch_size), description=description, disable=not progress):
        families, questions, answers, frames = zip(*asked[start : start + batch_size], strict=True)
        batch = cache[[index for indices in frames for index in indices]]
        inputs = processor(
            text=make_prompts(processor, questions, "video"),
            voco_cache=batch,
            num_frames=list(map(len, frames)),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(**inputs, voco_cache=batch, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        predictions = decode_answers(processor, ids[:, inputs["input_ids"].shape[1] :])
        for family, prediction, answer in zip(families, predictions, answers, strict=True):
            for group in (family,) if family == STILL else (family, TEMPORAL):
                correct[group].append(prediction == answer)
    return {group: sum(correct[group]) / len(correct[group]) for group in GROUPS if correct[group]}


def chance(results: VideoResults) -> dict[str, float]:
    """What guessing gets right, by family; no guess is as good for `"still"`."""
    weighted = sum(CHANCE[family] * results.num_questions[family] for family in TEMPORAL_FAMILIES)
    return {TEMPORAL: weighted / max(1, results.num_questions[TEMPORAL]), **CHANCE}


def print_video_results(results: VideoResults, console: Console | None = None) -> None:
    """Prints the results as a table, in percent."""
    table = Table(
        title=f"Exact match on the {results.split} split ({results.num_clips} videos of {NUM_FRAMES} frames), percent"
    )
    for heading in ("a frame", "frames shown"):
        table.add_column(heading, no_wrap=True)
    for group in GROUPS:
        table.add_column(group, justify="right")
    for k, readings in results.accuracy.items():
        for reading, scores in readings.items():
            table.add_row(k, reading, *(f"{100 * scores[group]:.1f}" if group in scores else "" for group in GROUPS))
    guesses = chance(results)
    table.add_section()
    table.add_row("chance", "", *(f"{100 * guesses[group]:.1f}" if group in guesses else "" for group in GROUPS))
    (console or Console()).print(table)


def plot_video_results(results: VideoResults, path: str | os.PathLike) -> None:
    """Draws the results as bars: one panel a number of VoCo tokens, one group of bars a family."""
    figure = Figure(figsize=(9, 1 + 2.4 * len(results.accuracy)), layout="constrained")
    panels = figure.subplots(len(results.accuracy), 1, sharex=True, squeeze=False)[:, 0]
    guesses = chance(results)
    for panel, (k, readings) in zip(panels, results.accuracy.items(), strict=True):
        for i, (reading, scores) in enumerate(readings.items()):
            places = [group + 0.27 * (i - 1) for group in range(len(GROUPS))]
            heights = [100 * scores.get(group, 0.0) for group in GROUPS]
            panel.bar(places, heights, 0.25, color=("C0", "0.75", "0.55")[i], label=reading, zorder=2)
        for group, name in enumerate(GROUPS):
            if name in guesses:
                level = 100 * guesses[name]
                label = "chance" if group == 0 else None
                panel.hlines(level, group - 0.4, group + 0.4, color="black", linewidth=1.5, label=label, zorder=3)
        panel.set_title(f"{k} a frame", loc="left")
        panel.set_ylabel("exact match, %")
        panel.set_ylim(0, 101)
        panel.grid(axis="y", color="0.9", zorder=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xticks(range(len(GROUPS)), GROUPS)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    with written_aside(path) as part:
        figure.savefig(part, dpi=150, format=Path(path).suffix[1:])
