"""Trains every way to shorten an image from one start, on the same data, for as many steps, and asks the questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ...loading import default_device
from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..data import phase_rows
from ..evaluation import UNCOMPRESSED, ScenesResults, score_readers
from ..phases import (
    common,
    compile_layers,
    final_dir,
    load_trained,
    load_weights,
    make_trainer,
    note,
    save_phase,
    train,
)
from ..provenance import claim, is_made, made_of
from ..readers import Reader, causal_reader, preprocess, uncompressed_reader, voco_reader
from ..recipe import FROZEN_TOWER, Phase, Recipe
from ..running import run_phase
from ..single_questions import SingleQuestionCollator
from ..still import make_scenes
from .baselines import put_compressor
from .describing import LONGEST_DESCRIPTION, OBJECTS, name_objects
from .following import EXACT_MATCH, Curve, Follower, Point
from .sizes import SCENES_64_SIZE, Size


Found = TypeVar("Found")

CAUSAL = "causal"
FIRST_SEED = 0
EVALUATIONS = 10  # of a training, as it goes
# Of the dense scenes of the validation split by which a training is followed
FOLLOWED_QUESTIONS, FOLLOWED_ROWS = 7, 64


@dataclass(frozen=True)
class Arm:
    """
    One way to shorten an image.

    Args:
        name (`str`): What the table calls it.
        num_voco_tokens (`tuple[int, ...]`): Numbers of VoCo tokens to train with; 0 reads all vision tokens.
        read_at (`tuple[int, ...]`): Numbers of VoCo tokens to evaluate.
        attention_mode (`str`): What text sees in training.
        compressor (`str`, *optional*): What stands behind the vision tower, see [`put_compressor`].
        num_tokens (`int`): Tokens that it makes of an image.
        distillation_weight (`float`): Weight of the divergence from the model that all arms start from.
        distillation_temperature (`float`): Softens both distributions.
        draws (`int`): Numbers of VoCo tokens that each step reads its images with.
    """

    name: str
    num_voco_tokens: tuple[int, ...]
    read_at: tuple[int, ...] = ()
    attention_mode: str = "voco"
    compressor: str | None = None
    num_tokens: int = 1
    distillation_weight: float = 0.0
    distillation_temperature: float = 1.0
    draws: int = 1

    @property
    def folder(self) -> str:
        """Of what is trained, by the name and, where it is drawn from several, by the numbers."""
        several = f" {' '.join(map(str, self.num_voco_tokens))}" if len(self.num_voco_tokens) > 1 else ""
        return f"{self.name}{several}".replace(",", "").replace(" ", "-")


UPPER = Arm("upper bound", (1,), read_at=(1,), attention_mode=CAUSAL)


def fixed_arm(k: int, read_at: tuple[int, ...] = ()) -> Arm:
    """One number of VoCo tokens in training, and asked at, or asked at others."""
    return Arm(f"trained at k={k}", (k,), read_at=read_at or (k,))


def elastic_arm(ks: tuple[int, ...]) -> Arm:
    """Every number of VoCo tokens, and none."""
    return Arm("elastic", (*ks, 0), read_at=ks)


def make_arms(ks: tuple[int, ...]) -> tuple[Arm, ...]:
    """
    All arms, in the order of the table, for the numbers of VoCo tokens `ks`, ascending. What the largest taught is
    asked at all (paper, Table 4).
    """
    return (
        UPPER,
        Arm("average pooling", (0,), compressor="average pooling"),
        Arm("q-former", (0,), compressor="q-former"),
        *(fixed_arm(k, read_at=ks if k == ks[-1] else ()) for k in ks),
        elastic_arm(ks),
    )


@dataclass
class Study:
    """
    The arms, trained in a folder or found there.

    Args:
        work_dir (`Path`): Folder of weights and answers; what an interrupted run has left is kept.
        size ([`Size`], *optional*): How large everything is.
        trained_base (`Path`, *optional*): Folder of the model that all arms start from, where it is trained already.
        compile (`bool`, *optional*, defaults to `True`): Whether to compile the layers, which needs a C++ compiler.
    """

    work_dir: Path
    size: Size = SCENES_64_SIZE
    trained_base: Path | None = None
    compile: bool = True
    _rows: tuple[int, Dataset] | None = field(default=None, init=False)

    @property
    def base(self) -> Recipe:
        """How the model is trained that all arms start from."""
        return self.size.base

    @property
    def start(self) -> Path:
        """Folder of the model that all arms start from."""
        return self.trained_base or final_dir(self.work_dir, self.base.phases[-1].name)

    @cached_property
    def processor(self) -> VoCoLlamaProcessor:
        """The processor of all arms."""
        return VoCoLlamaProcessor.from_pretrained(self.start)

    def prepare(self) -> None:
        """
        Trains the model that all arms start from, unless it is there.

        Raises:
            ValueError: if the folder holds one that was trained otherwise.
        """
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if self.trained_base is None:
            train(self.base, self.work_dir, self.compile)

    def trained(self, arm: Arm, seed: int, learning_rate: float | None = None) -> VoCoLlamaForConditionalGeneration:
        """The model of an arm, trained or loaded."""
        model = self._untrained(arm, seed)
        model.load_state_dict(load_weights(self.folder_of(arm, seed, learning_rate)))
        return model.to(default_device()).eval()

    def folder_of(self, arm: Arm, seed: int, learning_rate: float | None = None) -> Path:
        """Folder of the arm, trained now or before, by default at its own learning rate."""
        return self._train_at(arm, seed, learning_rate or self.learning_rate(arm))

    def learning_rate(self, arm: Arm) -> float:
        """The one with which an arm reads validation best, trained with the first seed."""
        rates = self.size.learning_rates
        return max(rates, key=lambda rate: self.validated(arm, rate)) if len(rates) > 1 else rates[0]

    def validated(self, arm: Arm, learning_rate: float) -> float:
        """Exact match on validation, from 0 to 1, after the training with the first seed."""
        return self.curve(arm, FIRST_SEED, learning_rate)[-1].exact_match

    def search(self, arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
        """By arm, the learning rates that were tried, and what [`Study.validated`] says of each."""
        rates = self.size.learning_rates
        return {arm.name: {f"{rate:g}": self.validated(arm, rate) for rate in rates} for arm in arms}

    def curve(self, arm: Arm, seed: int, learning_rate: float | None = None) -> Curve:
        """What the training of an arm has come through."""
        log = json.loads((self.folder_of(arm, seed, learning_rate) / "log.json").read_text())["log"]
        # Of what is distilled the next-token loss alone, to compare it with the others'
        return [
            Point(entry["step"], entry.get("eval_nll_loss", entry["eval_loss"]), entry[EXACT_MATCH])
            for entry in log
            if EXACT_MATCH in entry
        ]

    def teacher(self) -> VoCoLlamaForConditionalGeneration:
        """The model that all arms start from."""
        return load_trained(self.start)

    def _untrained(self, arm: Arm, seed: int) -> VoCoLlamaForConditionalGeneration:
        model = VoCoLlamaForConditionalGeneration.from_pretrained(
            self.start, dtype=torch.float32, attn_implementation=self.base.attention
        )
        torch.manual_seed(seed)
        if arm.compressor is not None:
            put_compressor(model, arm.compressor, arm.num_tokens)
        return model

    def _train_at(self, arm: Arm, seed: int, learning_rate: float) -> Path:
        """
        Folder of the arm, trained now or before.

        Raises:
            ValueError: if there is one that was trained otherwise.
        """
        name = f"{arm.folder}-{self.size.steps}-steps-at-{learning_rate:g}-seed-{seed}"
        final, phase = final_dir(self.work_dir, name), self._phase(arm, name, learning_rate)
        # Other scenes than those that the start has seen
        recipe = replace(self.base, seed=self.base.seed + 1 + seed)
        made = made_of(self.start, common(recipe), phase, replace(arm, read_at=()))
        if not is_made(final, made):
            claim(self.work_dir / phase.name, made)
            self._train(arm, seed, recipe, phase, final)
        return final

    def _train(self, arm: Arm, seed: int, recipe: Recipe, phase: Phase, final: Path) -> None:
        model = self._untrained(arm, seed)
        model.config.attention_mode = arm.attention_mode
        if self.compile:
            compile_layers(model, with_attention=not phase.two_stages)
        trainer = self._trainer(model, arm, recipe, phase)
        for callback in self._callbacks(arm, phase):
            trainer.add_callback(callback)
        log = run_phase(trainer)
        save_phase(model, self.processor, note(phase.name, phase.steps, log), self.work_dir / phase.name, final)

    def _callbacks(self, arm: Arm, phase: Phase) -> list[TrainerCallback]:
        """What measures the training as it goes."""
        recipe = replace(self.base, dense_share=1.0)
        rows = phase_rows(recipe, replace(phase, describe=False, questions=FOLLOWED_QUESTIONS), "validation")
        collate = SingleQuestionCollator(self.processor, max(1, arm.num_voco_tokens[0]))
        starts = range(0, len(rows), FOLLOWED_ROWS)
        batches = [collate([rows[i] for i in range(len(rows))[start:][:FOLLOWED_ROWS]]) for start in starts]
        return [Follower(batches, UNCOMPRESSED if arm.num_voco_tokens[0] == 0 else arm.attention_mode)]

    def _phase(self, arm: Arm, name: str, learning_rate: float) -> Phase:
        return Phase(
            name,
            self.size.steps,
            learning_rate,
            "cosine",
            arm.num_voco_tokens,
            draws=arm.draws,
            questions=self.size.questions,
            describe=True,
            single=True,
            two_stages=arm.draws > 1,
            freeze=FROZEN_TOWER,
            evaluations=min(EVALUATIONS, self.size.steps),
        )

    def _trainer(self, model: VoCoLlamaForConditionalGeneration, arm: Arm, recipe: Recipe, phase: Phase) -> Trainer:
        return make_trainer(
            model,
            self.processor,
            recipe,
            phase,
            self.work_dir / phase.name,
            distillation_weight=arm.distillation_weight,
            distillation_temperature=arm.distillation_temperature,
            teacher=str(self.start) if arm.distillation_weight > 0 else "self",
            train_dataset=self._drawn(arm, recipe, phase),
        )

    def _drawn(self, arm: Arm, recipe: Recipe, phase: Phase) -> Dataset:
        """What an arm is trained on: the rows of a seed, the same for all, which keep what others have drawn."""
        if self._rows is None or self._rows[0] != recipe.seed:
            self._rows = recipe.seed, phase_rows(recipe, phase, "train")
        return self._rows[1]

    def answers(self, arm: Arm, seed: int, split: str, limit: int, progress: bool = True) -> ScenesResults:
        """
        How well an arm answers the questions of a split, and names the objects of its scenes, measured or read from
        where it was written.
        """
        numbers = "-".join(map(str, arm.read_at))
        path = self.folder_of(arm, seed) / f"answers-{split}-{limit}-at-{numbers}.json"
        if not path.exists():
            model = self.trained(arm, seed)
            scenes = make_scenes(split, limit, canvas=self.base.canvas)
            readers = make_readers(arm, model, self.processor, scenes)
            results = score_readers(readers, scenes, split, shuffled=False, progress=progress)
            for reading, reader in readers.items():
                for difficulty, share in name_objects(reader, scenes).items():
                    results.accuracy[reading][difficulty][OBJECTS] = share
            results.save(path)
        return ScenesResults(**json.loads(path.read_text()))


def make_readers(
    arm: Arm, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, scenes: Dataset
) -> dict[str, Reader]:
    """The ways in which an arm is asked."""
    shown = model, processor, preprocess(processor, scenes)
    longest = LONGEST_DESCRIPTION
    readers: dict[str, Reader] = {}
    if arm.attention_mode == CAUSAL:
        readers[CAUSAL] = causal_reader(*shown, arm.num_voco_tokens[0], longest)
    readers |= {f"k={k}": voco_reader(*shown, k, max_new_tokens=longest) for k in arm.read_at}
    if arm.compressor is not None:
        readers["k=1"] = uncompressed_reader(*shown, longest)
    elif 0 in arm.num_voco_tokens:
        readers[UNCOMPRESSED] = uncompressed_reader(*shown, longest)
    return readers


def run_study(
    study: Study,
    arms: Sequence[Arm],
    seeds: range,
    split: str,
    limit: int,
    report: Callable[[str], None] = print,
) -> dict[str, list[ScenesResults]]:
    """
    Trains arms and asks them about scenes.

    Args:
        study ([`Study`]): Where and how.
        arms (`Sequence[Arm]`): What is compared, as of [`make_arms`].
        seeds (`range`): Seeds of the training: its scenes, their order, and weights that are new to an arm.
        split (`str`): Split to ask about.
        limit (`int`): Number of its scenes.
        report (`Callable`): Told what is done next.

    Returns:
        `dict[str, list[ScenesResults]]`: results by arm, one a seed.
    """
    return run_arms(study, arms, seeds, lambda arm, seed: study.answers(arm, seed, split, limit), report)


def run_arms(
    study: Study,
    arms: Sequence[Arm],
    seeds: range,
    ask: Callable[[Arm, int], Found],
    report: Callable[[str], None],
) -> dict[str, list[Found]]:
    """What `ask` finds of each arm, by its name, one a seed."""
    report("the model that all start from")
    study.prepare()
    found: dict[str, list[Found]] = {arm.name: [] for arm in arms}
    # Seed by seed, so that an interrupted study has whole tables
    for i, (seed, arm) in enumerate(product(seeds, arms)):
        report(f"{i + 1} of {len(seeds) * len(arms)}: {arm.name}, seed {seed}")
        found[arm.name].append(ask(arm, seed))
    return found


@dataclass
class Courses:
    """
    How the arms were trained.

    Args:
        search (`dict[str, dict[str, float]]`): By arm, the learning rates that were tried, and the exact match on
            dense scenes of the validation split at the end.
        curves (`dict[str, list[Curve]]`): By arm, one a seed, what the trainings at the best have come through.
    """

    search: dict[str, dict[str, float]]
    curves: dict[str, list[Curve]]


def trace(study: Study, arms: Sequence[Arm], seeds: range) -> Courses:
    """The courses of the trainings of [`run_arms`]."""
    return Courses(study.search(arms), {arm.name: [study.curve(arm, seed) for seed in seeds] for arm in arms})
