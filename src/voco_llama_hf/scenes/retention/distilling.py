"""When distillation helps (paper, Eq. 5): few answers are known, and a teacher reads many more images uncompressed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...benchmark.report import Sheet
from ...files import written_aside
from ...pictures import prepare
from ..data import Draw
from ..evaluation import ScenesResults
from ..readers import uncompressed_reader
from ..recipe import Phase, Recipe
from .describing import LONGEST_DESCRIPTION
from .report import one_token_sheet, plot_curves, save_report
from .study import Arm, Courses, Study, fixed_arm, run_study, trace


KNOWN, UNKNOWN = 500, 4000  # scenes
ANSWERED_AT_A_TIME = 64  # of them


@dataclass(frozen=True)
class Lesson(Arm):
    """
    An [`Arm`] that is told few answers.

    Args:
        known (`int`): Scenes whose answers are known.
        unknown (`int`): Other scenes, with the answers of the model that all start from.
        distilled_share (`float`): Share of the steps after which the words alone are learned.
    """

    known: int = 0
    unknown: int = 0
    distilled_share: float = 1.0


class EndOfDistillation(TrainerCallback):
    """
    Goes on with the words alone.

    Args:
        step (`int`): Number of steps with distillation.
    """

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= self.step:
            args.distillation_weight = 0.0


def lessons(known: int = KNOWN, unknown: int = UNKNOWN) -> tuple[Arm, ...]:
    """
    With the few answers alone, with those of a teacher, and with all the true answers; of each the words only, and
    half and half with the distribution of the teacher: that of the teacher's answers also in other ways.
    """
    few = Lesson("few answers", (1,), read_at=(1,), known=known)
    words = replace(few, name="teacher's words", unknown=unknown)
    half = replace(words, name="teacher's distribution", distillation_weight=0.5)
    every = fixed_arm(1)
    return (
        few,
        replace(few, name="few answers, distilled", distillation_weight=0.5),
        words,
        half,
        replace(half, name=f"{half.name}, temperature 2", distillation_temperature=2.0),
        replace(half, name=f"{half.name} alone", distillation_weight=1.0),
        replace(half, name=f"{half.name}, first half", distilled_share=0.5),
        every,
        replace(every, name=f"{every.name}, distilled", distillation_weight=0.5),
    )


@dataclass
class DistillationStudy(Study):
    """Compression into one token with few known answers. Arguments are those of [`Study`]."""

    def _callbacks(self, arm: Arm, phase: Phase) -> list[TrainerCallback]:
        followers = super()._callbacks(arm, phase)
        if not isinstance(arm, Lesson) or arm.distilled_share == 1:
            return followers
        return [*followers, EndOfDistillation(round(arm.distilled_share * phase.steps))]

    def _drawn(self, arm: Arm, recipe: Recipe, phase: Phase) -> Dataset:
        rows = super()._drawn(arm, recipe, phase)
        if not isinstance(arm, Lesson):
            return rows
        if arm.unknown == 0:
            return rows.select(range(arm.known))
        answers = self._teacher_answers(rows, arm, recipe.seed)
        return Dataset.from_dict({"index": range(arm.known + arm.unknown)}).with_transform(
            with_answers(rows, answers, arm.known)
        )

    def _teacher_answers(self, rows: Dataset, arm: Lesson, seed: int) -> list[list[str]]:
        """What the teacher answers about the scenes after those whose answers are known, asked now or read."""
        path = self.work_dir / f"teacher-{arm.known}-{arm.unknown}-seed-{seed}.json"
        if not path.exists():
            teacher = self.teacher()
            answers: list[list[str]] = []
            unknown = range(arm.known, arm.known + arm.unknown)
            for start in range(0, arm.unknown, ANSWERED_AT_A_TIME):
                batch = [rows[index] for index in unknown[start:][:ANSWERED_AT_A_TIME]]
                pixels = prepare(self.processor.image_processor, [row["image"] for row in batch])
                read = uncompressed_reader(teacher, self.processor, pixels, LONGEST_DESCRIPTION)
                asked = [(i, turn["content"]) for i, row in enumerate(batch) for turn in row["messages"][::2]]
                said = iter(read([question for _, question in asked], [i for i, _ in asked]))
                answers += [[next(said) for _ in row["messages"][::2]] for row in batch]
            with written_aside(path) as part:
                part.write_text(json.dumps(answers))
        return json.loads(path.read_text())


def with_answers(rows: Dataset, answers: list[list[str]], known: int) -> Draw:
    """Draws `rows`, those after the first `known` with other answers."""

    def draw(batch: dict[str, list[int]]) -> dict[str, list]:
        drawn = [rows[index] for index in batch["index"]]
        messages = [
            row["messages"] if index < known else answered(row["messages"], answers[index - known])
            for index, row in zip(batch["index"], drawn, strict=True)
        ]
        return {"image": [row["image"] for row in drawn], "messages": messages}

    return draw


def answered(messages: list[dict[str, str]], answers: list[str]) -> list[dict[str, str]]:
    """A conversation with other answers."""
    said = iter(answers)
    return [turn if turn["role"] == "user" else {**turn, "content": next(said)} for turn in messages]


@dataclass
class Lessons:
    """
    What distillation added.

    Args:
        about (`dict`): What was trained and asked.
        results (`dict[str, list[ScenesResults]]`): By arm, one a seed.
        courses ([`Courses`]): How the arms were trained.
    """

    about: dict[str, object]
    results: dict[str, list[ScenesResults]]
    courses: Courses

    def sheet(self) -> Sheet:
        """Objects that are named and answers that are right, in percent, by arm, of sparse and dense scenes."""
        title = f"One VoCo token, few answers: percent ({self.about['steps']} steps)"
        return one_token_sheet(title, "trained with", self.results)

    def print(self, console: Console) -> None:
        """Prints the table, in percent."""
        self.sheet().print(console)

    def save(self, path: Path) -> None:
        """Writes the results as JSON, or the table as Markdown if the name ends so."""
        markdown = self.sheet().markdown_table() + "\n"
        save_report(path, markdown, **self.about, results=self.results, **asdict(self.courses))

    def plot(self, path: Path) -> None:
        """Draws the courses of the trainings."""
        plot_curves(self.courses.curves, path)


def run_distillation(
    study: DistillationStudy,
    seeds: range,
    split: str,
    limit: int,
    report: Callable[[str], None] = print,
    known: int = KNOWN,
    unknown: int = UNKNOWN,
) -> Lessons:
    """
    Trains and asks all arms.

    Args:
        study ([`DistillationStudy`]): Where and how.
        seeds (`range`): Seeds of the training.
        split (`str`): Split to ask about.
        limit (`int`): Number of its scenes.
        report (`Callable`): Told what is done next.
        known (`int`): Scenes whose answers are known.
        unknown (`int`): Scenes that the teacher is asked about.
    """
    arms = lessons(known, unknown)
    results = run_study(study, arms, seeds, split, limit, report)
    about = {
        "split": split,
        "limit": limit,
        "steps": study.size.steps,
        "seeds": len(seeds),
        "known": known,
        "unknown": unknown,
    }
    return Lessons(about, results, trace(study, arms, seeds))
