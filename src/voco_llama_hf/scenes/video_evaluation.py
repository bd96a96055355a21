"""How well a checkpoint understands what happens in a video: with all frames, with one, and out of order."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from matplotlib.figure import Figure
from rich.table import Table

from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .canvas import Canvas, canvas_of
from .moving import CHANCE, NUM_FRAMES, STILL, TEMPORAL_FAMILIES, make_clips
from .readers import VideoReader, voco_video_reader
from .scoring import Asked, Results, add_bars, add_legend, add_levels, add_panels, percent, score


TEMPORAL = "temporal"  # all questions that one frame cannot answer
ALL_FRAMES, ONE_FRAME, OUT_OF_ORDER = READINGS = ("all frames", "one frame", "out of order")
GROUPS = (TEMPORAL, *TEMPORAL_FAMILIES, STILL)


@dataclass
class VideoResults(Results):
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

    num_clips: int
    num_questions: dict[str, int]
    accuracy: dict[str, dict[str, dict[str, float]]]

    def table(self) -> Table:
        title = f"Exact match on the {self.split} split ({self.num_clips} videos of {NUM_FRAMES} frames), percent"
        table = Table(title=title)
        for heading in ("a frame", "frames shown"):
            table.add_column(heading, no_wrap=True)
        for group in GROUPS:
            table.add_column(group, justify="right")
        for mode, readings in self.accuracy.items():
            for reading, scores in readings.items():
                table.add_row(mode, reading, *(percent(scores.get(group)) for group in GROUPS))
        guesses = chance(self)
        table.add_section()
        table.add_row("chance", "", *(percent(guesses.get(group)) for group in GROUPS))
        return table

    def draw(self, figure: Figure) -> None:
        figure.set_size_inches(9, 1 + 2.4 * len(self.accuracy))
        panels = add_panels(figure, [f"{mode} a frame" for mode in self.accuracy], GROUPS)
        guesses = chance(self)
        for panel, readings in zip(panels, self.accuracy.values(), strict=True):
            for i, (reading, scores) in enumerate(readings.items()):
                shares = [scores.get(group, 0.0) for group in GROUPS]
                add_bars(panel, shares, i, len(readings), ("C0", "0.75", "0.55")[i], reading)
            # No guess is as good for the last group
            add_levels(panel, [guesses[group] for group in GROUPS if group in guesses], 0, 1, "chance")
        add_legend(figure, panels[0])


def evaluate_videos(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    split: str = "test",
    num_voco_tokens: tuple[int, ...] = (2,),
    batch_size: int = 64,
    limit: int = 300,
    seed: int = 0,
    progress: bool = True,
    canvas: Canvas | None = None,
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
        canvas ([`Canvas`], *optional*):
            Where videos are drawn, by default as large as the model's images, or 64x64 pixels.

    Returns:
        [`VideoResults`]
    """
    canvas = canvas or canvas_of(model.config.vision_config.image_size)
    clips = make_clips(split, limit, seed, canvas=canvas)
    frames = [frame for images in clips["images"] for frame in images]
    readers = {f"k={k}": voco_video_reader(model, processor, frames, k, progress) for k in num_voco_tokens}
    return score_video_readers(readers, clips, split, batch_size, seed, progress)


def score_video_readers(
    readers: dict[str, VideoReader],
    clips: Dataset,
    split: str,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> VideoResults:
    """
    What [`evaluate_videos`] does, for readers of any kind.

    Args:
        readers (`dict[str, Callable]`):
            By mode: a function that takes the indices of the frames of each video, among the frames of all videos, and
            returns one that answers questions about the videos at given indices.
        clips ([`~datasets.Dataset`]): Rows of [`make_clips`].
        split, batch_size, seed, progress: See [`evaluate_videos`].

    Returns:
        [`VideoResults`]
    """
    asked = [
        Asked(question, answer, i, (family,) if family == STILL else (family, TEMPORAL))
        for i, clip in enumerate(clips.select_columns(["families", "questions", "answers"]))
        for family, question, answer in zip(clip["families"], clip["questions"], clip["answers"], strict=True)
    ]
    counts = Counter(group for one in asked for group in one.groups)
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    for mode, reader in readers.items():
        for reading, shown in choose_frames(len(clips), seed).items():
            scores = score(reader(shown), asked, batch_size, f"{split}, {mode}, {reading}", progress)
            accuracy.setdefault(mode, {})[reading] = {group: scores[group] for group in GROUPS if group in scores}
    return VideoResults(split, len(clips), {group: counts[group] for group in GROUPS}, accuracy)


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


def chance(results: VideoResults) -> dict[str, float]:
    """What guessing gets right, by family; no guess is as good for `"still"`."""
    weighted = sum(CHANCE[family] * results.num_questions[family] for family in TEMPORAL_FAMILIES)
    return {TEMPORAL: weighted / max(1, results.num_questions[TEMPORAL]), **CHANCE}
