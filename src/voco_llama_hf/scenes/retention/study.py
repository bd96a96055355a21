"""Trains every way to shorten an image from one start, on the same data, for as many steps, and asks the questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer

from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..evaluation import UNCOMPRESSED, ScenesResults, score_readers
from ..phases import compile_layers, final_dir, load_weights, make_trainer, note, save_phase, train
from ..readers import Reader, causal_reader, preprocess, uncompressed_reader, voco_reader
from ..recipe import SCENES_64, Phase, Recipe
from ..running import run_phase
from ..still import make_scenes
from .baselines import put_compressor


CAUSAL = "causal"
QUESTIONS = 6  # about an image, in a step
LEARNING_RATE = 1e-3
FROZEN = ("vision_tower",)
# A LLaVA of the scenes
BASE = Recipe(phases=SCENES_64.phases[:2])


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
    """

    name: str
    num_voco_tokens: tuple[int, ...]
    read_at: tuple[int, ...] = ()
    attention_mode: str = "voco"
    compressor: str | None = None
    num_tokens: int = 1
    distillation_weight: float = 0.0

    @property
    def folder(self) -> str:
        return self.name.replace(",", "").replace(" ", "-")


UPPER = Arm("upper bound", (1,), read_at=(1,), attention_mode=CAUSAL)


def fixed_arm(k: int, read_at: tuple[int, ...] = ()) -> Arm:
    """One number of VoCo tokens in training, and asked at, or asked at others."""
    return Arm(f"trained at k={k}", (k,), read_at=read_at or (k,))


def elastic_arm(ks: tuple[int, ...]) -> Arm:
    """Every number of VoCo tokens, and none."""
    return Arm("elastic", (*ks, 0), read_at=ks)


def make_arms(ks: tuple[int, ...]) -> tuple[Arm, ...]:
    """
    All arms, in the order of the table, for the numbers of VoCo tokens `ks`, ascending. One number is trained at its
    smallest and at its largest, and what the largest taught is asked at all (paper, Table 4).
    """
    return (
        UPPER,
        Arm("uncompressed only", (0,)),
        Arm("average pooling", (0,), compressor="average pooling"),
        Arm("q-former", (0,), compressor="q-former"),
        *(fixed_arm(k, read_at=ks if k == ks[-1] else ()) for k in sorted({ks[0], ks[-1]})),
        elastic_arm(ks),
        replace(elastic_arm(ks), name="elastic, distilled", distillation_weight=0.5),
    )


@dataclass
class Study:
    """
    The arms, trained in a folder or found there.

    Args:
        work_dir (`Path`): Folder of data, weights and answers; what an interrupted run has left is kept.
        steps (`int`): Optimizer steps of every arm.
        base ([`Recipe`], *optional*): How the model is trained that all arms start from.
        trained_base (`Path`, *optional*): Folder of that model, where it is trained already.
        compile (`bool`, *optional*, defaults to `True`): Whether to compile the layers, which needs a C++ compiler.
    """

    work_dir: Path
    steps: int
    base: Recipe = BASE
    trained_base: Path | None = None
    compile: bool = True

    @property
    def start(self) -> Path:
        """Folder of the model that all arms start from."""
        return self.trained_base or final_dir(self.work_dir, self.base.phases[-1].name)

    @cached_property
    def processor(self) -> VoCoLlamaProcessor:
        """The processor of all arms."""
        return VoCoLlamaProcessor.from_pretrained(self.start)

    def prepare(self) -> None:
        """Trains the model that all arms start from, unless it is there."""
        self.work_dir.mkdir(parents=True, exist_ok=True)
        if self.trained_base is None:
            train(self.base, self.work_dir, self.compile)

    def trained(self, arm: Arm, seed: int) -> VoCoLlamaForConditionalGeneration:
        """The model of an arm, trained or loaded."""
        final = self._final(arm, seed)
        if not final.exists():
            self._train(arm, seed, final)
        model = self._untrained(arm, seed)
        model.load_state_dict(load_weights(final))
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _final(self, arm: Arm, seed: int) -> Path:
        return final_dir(self.work_dir, f"{arm.folder}-{self.steps}-steps-seed-{seed}")

    def _untrained(self, arm: Arm, seed: int) -> VoCoLlamaForConditionalGeneration:
        model = VoCoLlamaForConditionalGeneration.from_pretrained(
            self.start, dtype=torch.float32, attn_implementation=self.base.attention
        )
        torch.manual_seed(seed)
        if arm.compressor is not None:
            put_compressor(model, arm.compressor, arm.num_tokens)
        return model

    def _train(self, arm: Arm, seed: int, final: Path) -> None:
        model = self._untrained(arm, seed)
        model.config.attention_mode = arm.attention_mode
        name = final.name.removesuffix("-final")
        phase = self._phase(arm, name)
        if self.compile:
            compile_layers(model, with_attention=not phase.two_stages)
        trainer = self._trainer(model, arm, replace(self.base, seed=seed), phase)
        log = run_phase(trainer)
        save_phase(model, self.processor, note(name, self.steps, log), final)

    def _phase(self, arm: Arm, name: str) -> Phase:
        return Phase(
            name,
            self.steps,
            LEARNING_RATE,
            "cosine",
            arm.num_voco_tokens,
            questions=QUESTIONS,
            describe=True,
            single=True,
            freeze=FROZEN,
        )

    def _trainer(self, model: VoCoLlamaForConditionalGeneration, arm: Arm, recipe: Recipe, phase: Phase) -> Trainer:
        return make_trainer(
            model,
            self.processor,
            recipe,
            phase,
            self.work_dir / phase.name,
            distillation_weight=arm.distillation_weight,
            teacher=str(self.start) if arm.distillation_weight > 0 else "self",
        )

    def answers(self, arm: Arm, seed: int, split: str, limit: int, progress: bool = True) -> ScenesResults:
        """How well an arm answers the questions of a split, measured or read from where it was written."""
        path = self._final(arm, seed) / f"results-{split}-{limit}.json"
        if not path.exists():
            model = self.trained(arm, seed)
            scenes = make_scenes(split, limit, canvas=self.base.canvas)
            readers = make_readers(arm, model, self.processor, scenes)
            score_readers(readers, scenes, split, shuffled=False, progress=progress).save(path)
        return ScenesResults(**json.loads(path.read_text()))


def make_readers(
    arm: Arm, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, scenes: Dataset
) -> dict[str, Reader]:
    """The ways in which an arm is asked."""
    images = preprocess(processor, scenes)
    readers: dict[str, Reader] = {}
    if arm.attention_mode == CAUSAL:
        readers[CAUSAL] = causal_reader(model, processor, images, arm.num_voco_tokens[0])
    readers |= {f"k={k}": voco_reader(model, processor, images, k) for k in arm.read_at}
    if arm.compressor is not None:
        readers["k=1"] = uncompressed_reader(model, processor, images)
    elif 0 in arm.num_voco_tokens:
        readers[UNCOMPRESSED] = uncompressed_reader(model, processor, images)
    return readers


def run_study(
    study: Study,
    ks: tuple[int, ...],
    seeds: range,
    split: str,
    limit: int,
    report: Callable[[str], None] = print,
) -> dict[str, list[ScenesResults]]:
    """
    Trains and asks all arms.

    Args:
        study ([`Study`]): Where and how.
        ks (`tuple[int, ...]`): Numbers of VoCo tokens, ascending.
        seeds (`range`): Seeds of the training: order of the data, and weights that are new to an arm.
        split (`str`): Split to ask about.
        limit (`int`): Number of its scenes.
        report (`Callable`): Told what is done next.

    Returns:
        `dict[str, list[ScenesResults]]`: results by arm, one a seed.
    """
    report("the model that all start from")
    study.prepare()
    results: dict[str, list[ScenesResults]] = {}
    arms = make_arms(ks)
    # Seed by seed, so that an interrupted study has whole tables
    for i, (seed, arm) in enumerate((seed, arm) for seed in seeds for arm in arms):
        report(f"{i + 1} of {len(seeds) * len(arms)}: {arm.name}, seed {seed}")
        results.setdefault(arm.name, []).append(study.answers(arm, seed, split, limit))
    return results
