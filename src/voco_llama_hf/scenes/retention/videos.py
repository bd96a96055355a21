"""VoCo beside earlier ways to shorten the frames of a video, at equal tokens a frame (paper, Table 8)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
from datasets import Dataset
from matplotlib.figure import Figure
from rich.table import Table
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...files import written_aside
from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..building import add_tokens
from ..data import phase_rows
from ..moving import NUM_FRAMES, WORDS, make_clips
from ..muon import MuonMixin
from ..phases import training_options
from ..readers import VideoReader, uncompressed_video_reader, voco_video_reader
from ..recipe import Phase, Recipe
from ..scoring import add_bars, add_legend, add_levels, add_panels, percent
from ..video_evaluation import ALL_FRAMES, GROUPS, TEMPORAL, VideoResults, chance, score_video_readers
from .llama_vid import LlamaVid, LlamaVidCollator, llama_vid_reader
from .report import percent as mean_percent
from .report import save_report
from .study import FIRST_SEED, Arm, Study, run_arms


LLAMA_VID = Arm("llama-vid", (0,), compressor="llama-vid", num_tokens=2)
VALIDATION_CLIPS = 200  # by which a learning rate is chosen
VIDEO_QUESTIONS = 6  # with fewer, some families are never asked about
READING = "a frame"  # the only mode of an arm's results


def video_arms(ks: Sequence[int]) -> tuple[Arm, ...]:
    """All ways to make so many tokens of a frame; LLaMA-VID's makes two."""
    arms: list[Arm] = []
    for k in ks:
        arms += [
            Arm(f"VoCo, {k} a frame", (k,), read_at=(k,)),
            Arm(f"average pooling, {k} a frame", (0,), compressor="average pooling", num_tokens=k),
            Arm(f"q-former, {k} a frame", (0,), compressor="q-former", num_tokens=k),
        ]
    return (*arms, LLAMA_VID)


class LlamaVidTrainer(MuonMixin, Trainer):
    """[`~transformers.Trainer`] with [`MuonWithAdamW`]."""


@dataclass
class VideoStudy(Study):
    """
    The arms on videos, trained in a folder or found there. All start from a model that has seen images alone; every
    other row of their training is a video. Arguments are those of [`Study`].
    """

    @cached_property
    def processor(self) -> VoCoLlamaProcessor:
        """The processor of all arms, with the words of videos."""
        processor = VoCoLlamaProcessor.from_pretrained(self.start)
        add_tokens(processor, WORDS)
        return processor

    def _untrained(self, arm: Arm, seed: int) -> VoCoLlamaForConditionalGeneration:
        model = super()._untrained(arm, seed)
        torch.manual_seed(seed)  # of new words, the same in all arms
        model.resize_token_embeddings(len(self.processor.tokenizer))
        return model

    def validated(self, arm: Arm, learning_rate: float) -> float:
        """Exact match on temporal questions of the validation split, from 0 to 1."""
        results = self.video_answers(arm, FIRST_SEED, "validation", VALIDATION_CLIPS, learning_rate=learning_rate)
        return results.accuracy[READING][ALL_FRAMES][TEMPORAL]

    def _callbacks(self, arm: Arm, phase: Phase) -> list[TrainerCallback]:
        return []

    def _phase(self, arm: Arm, name: str, learning_rate: float) -> Phase:
        phase = super()._phase(arm, name, learning_rate)
        questions = max(VIDEO_QUESTIONS, phase.questions)
        return replace(phase, videos=True, two_stages=arm.compressor is None, questions=questions)

    def _trainer(self, model: VoCoLlamaForConditionalGeneration, arm: Arm, recipe: Recipe, phase: Phase) -> Trainer:
        if arm.compressor != LLAMA_VID.compressor:
            return super()._trainer(model, arm, recipe, phase)
        model.model.vision_tower.requires_grad_(False)
        recipe = recipe.for_phase(phase)
        return LlamaVidTrainer(
            LlamaVid(model),
            TrainingArguments(**training_options(recipe, phase, self.work_dir / phase.name)),
            data_collator=LlamaVidCollator(self.processor),
            train_dataset=self._drawn(arm, recipe, phase),
            eval_dataset=phase_rows(recipe, phase, "validation"),
        )

    def video_answers(
        self, arm: Arm, seed: int, split: str, limit: int, progress: bool = True, learning_rate: float | None = None
    ) -> VideoResults:
        """How well an arm answers the questions about videos, measured or read from where it was written."""
        path = self.folder_of(arm, seed, learning_rate) / f"videos-{split}-{limit}.json"
        if not path.exists():
            clips = make_clips(split, limit, canvas=self.base.canvas)
            reader = make_video_reader(arm, self.trained(arm, seed, learning_rate), self.processor, clips)
            score_video_readers({READING: reader}, clips, split, progress=progress).save(path)
        return VideoResults(**json.loads(path.read_text()))


def make_video_reader(
    arm: Arm, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, clips: Dataset
) -> VideoReader:
    """The way in which an arm is asked."""
    frames = [frame for images in clips["images"] for frame in images]
    if arm.compressor == LLAMA_VID.compressor:
        return llama_vid_reader(model, processor, frames)
    if arm.compressor is not None:
        return uncompressed_video_reader(model, processor, frames)
    return voco_video_reader(model, processor, frames, arm.read_at[0])


def run_video_study(
    study: VideoStudy, ks: Sequence[int], seeds: range, split: str, limit: int, report: Callable[[str], None] = print
) -> VideoComparison:
    """
    Trains and asks all arms.

    Args:
        study ([`VideoStudy`]): Where and how.
        ks (`Sequence[int]`): Tokens a frame.
        seeds (`range`): Seeds of the training: what is drawn, its order, and weights that are new to an arm.
        split (`str`): Split to ask about.
        limit (`int`): Number of its videos.
        report (`Callable`): Told what is done next.

    Returns:
        [`VideoComparison`]
    """
    arms = video_arms(ks)
    results = run_arms(study, arms, seeds, lambda arm, seed: study.video_answers(arm, seed, split, limit), report)
    # One learning rate is not asked about
    search = study.search(arms) if len(study.size.learning_rates) > 1 else {}
    return VideoComparison(study.size.steps, results, search)


@dataclass
class VideoComparison:
    """
    Results of all arms.

    Args:
        steps (`int`): Steps that each was trained for.
        results (`dict[str, list[VideoResults]]`): By name of the arm, one a seed.
        search (`dict[str, dict[str, float]]`): By arm, the learning rates that were compared, and the exact match on
            temporal questions of the validation split; none where there was one.
    """

    steps: int
    results: dict[str, list[VideoResults]]
    search: dict[str, dict[str, float]] = field(default_factory=dict)

    def shares(self, arm: str, reading: str) -> dict[str, list[float]]:
        """Exact match from 0 to 1 by family, one number a seed."""
        scores = [results.accuracy[READING][reading] for results in self.results[arm]]
        return {group: [by_group[group] for by_group in scores] for group in GROUPS if group in scores[0]}

    @property
    def chance(self) -> dict[str, float]:
        """What guessing gets right, by family."""
        return chance(next(iter(self.results.values()))[0])

    def table(self) -> Table:
        """Exact match in percent, by family, with all frames, with one, and out of order."""
        some, *more = next(iter(self.results.values()))
        about = f"{some.split} split, {some.num_clips} videos of {NUM_FRAMES} frames, {self.steps} steps"
        table = Table(title=f"Exact match, percent ({about}, {len(more) + 1} seed{'s' if more else ''})")
        for heading in ("arm", "frames shown"):
            table.add_column(heading, no_wrap=True)
        for group in GROUPS:
            table.add_column(group, justify="right")
        for arm in self.results:
            for reading in some.accuracy[READING]:
                name = self._title(arm) if reading == ALL_FRAMES else ""
                table.add_row(name, reading, *self._cells(arm, reading))
        table.add_section()
        table.add_row("chance", "", *(percent(self.chance.get(group)) for group in GROUPS))
        return table

    def to_markdown(self) -> str:
        """The table with all frames, for a page."""
        lines = [f"| arm | {' | '.join(GROUPS)} |", "| --- |" + " ---: |" * len(GROUPS)]
        lines += [f"| {self._title(arm)} | {' | '.join(self._cells(arm, ALL_FRAMES))} |" for arm in self.results]
        return "\n".join(lines) + "\n"

    def _title(self, arm: str) -> str:
        """The arm, and the learning rate that was chosen for it where there were several."""
        tried = self.search.get(arm)
        return f"{arm}, at {max(tried, key=lambda rate: tried[rate])}" if tried else arm

    def _cells(self, arm: str, reading: str) -> list[str]:
        shares = self.shares(arm, reading)
        return [mean_percent(shares[group]) if group in shares else "" for group in GROUPS]

    def save(self, path: Path) -> None:
        """Writes the results as JSON, or the table as Markdown if the name ends so."""
        save_report(path, self.to_markdown(), **asdict(self))

    def plot(self, path: Path) -> None:
        """Draws what all frames tell, a panel for each number of tokens, one group of bars a family."""
        panels: dict[int, dict[str, str]] = {}  # arms by way, by number
        for arm in self.results:
            way, number = parse_arm(arm)
            panels.setdefault(number, {})[way] = arm
        ways = list(dict.fromkeys(parse_arm(arm)[0] for arm in self.results))
        figure = Figure(figsize=(11, 1 + 2.4 * len(panels)), layout="constrained")
        axes = add_panels(figure, [f"{number} a frame, all frames" for number in sorted(panels)], GROUPS)
        for panel, number in zip(axes, sorted(panels), strict=True):
            for i, (way, arm) in enumerate(panels[number].items()):
                shares = self.shares(arm, ALL_FRAMES)
                heights = [mean(shares[group]) if group in shares else 0.0 for group in GROUPS]
                add_bars(panel, heights, i, len(panels[number]), f"C{ways.index(way)}", way)
            add_levels(panel, [self.chance[group] for group in GROUPS if group in self.chance], 0, 1, "chance")
        add_legend(figure, max(axes, key=lambda panel: len(panel.containers)))
        with written_aside(path) as part:
            figure.savefig(part, dpi=150, format=path.suffix[1:])


def parse_arm(name: str) -> tuple[str, int]:
    """How an arm of [`video_arms`] shortens a frame, and to how many tokens."""
    way, _, rest = name.partition(", ")
    return way, int(rest.split()[0]) if rest else LLAMA_VID.num_tokens
