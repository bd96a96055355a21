"""How well a checkpoint reads the scenes: exact match of short answers, by difficulty, family and number of tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from datasets import Dataset
from matplotlib.figure import Figure
from rich.table import Table

from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .canvas import Canvas, canvas_of
from .readers import Reader, preprocess, uncompressed_reader, voco_reader
from .scoring import Asked, Results, add_bars, add_legend, add_levels, add_panels, percent, score
from .still import DIFFICULTIES, FAMILIES, make_scenes


Scores = dict[str, dict[str, float]]

UNCOMPRESSED = "uncompressed"
GROUPS = ("all", *FAMILIES)


@dataclass
class ScenesResults(Results):
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

    num_scenes: int
    num_questions: dict[str, dict[str, int]]
    accuracy: dict[str, Scores]
    blind: dict[str, Scores]

    def table(self) -> Table:
        table = Table(
            title=f"Exact match on the {self.split} split ({self.num_scenes} scenes), percent",
            caption="shuffled: every question asked about the image of another scene",
        )
        for heading in ("difficulty", "image read from"):
            table.add_column(heading, no_wrap=True)
        for group in GROUPS:
            table.add_column(group, justify="right")
        for difficulty in DIFFICULTIES:
            for name, modes in (("", self.accuracy), (", shuffled", self.blind)):
                for mode, scores in modes.items():
                    numbers = [percent(scores[difficulty].get(group)) for group in GROUPS]
                    table.add_row(difficulty, mode + name, *numbers, style="dim" if name else None)
            table.add_section()
        return table

    def draw(self, figure: Figure) -> None:
        figure.set_size_inches(11, 6)
        panels = add_panels(figure, DIFFICULTIES, GROUPS)
        for panel, difficulty in zip(panels, DIFFICULTIES, strict=True):
            for i, (mode, scores) in enumerate(self.accuracy.items()):
                place = i, len(self.accuracy)
                shares = [scores[difficulty].get(group, 0.0) for group in GROUPS]
                add_bars(panel, shares, *place, "0.55" if mode == UNCOMPRESSED else f"C{i}", mode)
                if mode in self.blind:
                    levels = [self.blind[mode][difficulty].get(group, 0.0) for group in GROUPS]
                    add_levels(panel, levels, *place, None if i else "images shuffled")
        add_legend(figure, panels[0])


def evaluate_scenes(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    split: str = "test",
    num_voco_tokens: tuple[int, ...] = (1, 2, 4, 8),
    include_uncompressed: bool = True,
    shuffled: bool = True,
    batch_size: int = 128,
    limit: int = 1000,
    seed: int = 0,
    progress: bool = True,
    canvas: Canvas | None = None,
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
        canvas ([`Canvas`], *optional*):
            Where scenes are drawn, by default as large as the model's images, or 64x64 pixels.

    Returns:
        [`ScenesResults`]
    """
    canvas = canvas or canvas_of(model.config.vision_config.image_size)
    scenes = make_scenes(split, limit, seed=seed, canvas=canvas)
    pixels = preprocess(processor, scenes)
    readers = {f"k={k}": voco_reader(model, processor, pixels, k) for k in num_voco_tokens}
    if include_uncompressed:
        readers[UNCOMPRESSED] = uncompressed_reader(model, processor, pixels)
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
        accuracy[mode] = _by_difficulty(
            score(reader, _questions(scenes, own), batch_size, f"{split}, {mode}", progress)
        )
        if shuffled:
            blind[mode] = _by_difficulty(
                score(reader, _questions(scenes, other), batch_size, f"{split}, {mode}, shuffled", progress)
            )
    counts = Counter(group for one in _questions(scenes, own) for group in one.groups)
    num_questions = {name: {group: counts[name, group] for group in (*FAMILIES, "all")} for name in DIFFICULTIES}
    return ScenesResults(split, len(scenes), num_questions, accuracy, blind)


def _questions(scenes: Dataset, image_of: list[int]) -> list[Asked[tuple[str, str]]]:
    """All questions, those of scene i about image `image_of[i]`."""
    return [
        Asked(question, answer, image_of[i], ((scene["difficulty"], family), (scene["difficulty"], "all")))
        for i, scene in enumerate(scenes.select_columns(["difficulty", "families", "questions", "answers"]))
        for family, question, answer in zip(scene["families"], scene["questions"], scene["answers"], strict=True)
    ]


def _by_difficulty(scores: dict[tuple[str, str], float]) -> Scores:
    return {
        name: {group: scores[name, group] for group in (*FAMILIES, "all") if (name, group) in scores}
        for name in DIFFICULTIES
    }


def _other_scenes(difficulties: list[str]) -> list[int]:
    """For each scene the next one of its difficulty, in a circle."""
    others = list(range(len(difficulties)))
    for name in DIFFICULTIES:
        members = [i for i, difficulty in enumerate(difficulties) if difficulty == name]
        for here, there in zip(members, members[1:] + members[:1], strict=True):
            others[here] = there
    return others


def retention(accuracy: float, lower: float, upper: float) -> float:
    """The share of what lies between two bounds (paper, Table 1); NaN where nothing does."""
    return (accuracy - lower) / (upper - lower) if upper != lower else float("nan")
