"""Training phase after phase, each of which resumes where it was interrupted."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ..files import new_folder
from ..loading import default_device
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..training import VoCoSFTConfig, VoCoSFTTrainer
from .building import add_tokens, build_model, build_processor
from .data import phase_rows
from .moving import WORDS
from .muon import MuonMixin
from .provenance import MADE_OF, claim, is_made, made_of
from .recipe import Phase, Recipe
from .running import phase_options, run_phase, seconds_spent
from .single_questions import SingleQuestionCollator
from .vision import train_vision_tower


VISION = "vision"  # name of the first phase
# Of a recipe: what is asked at the end, what each phase has of its own, and how the work is done
NOT_DECISIVE = (
    *("num_test_clips", "num_validation_scenes", "num_test_scenes"),
    *("phases", "start"),
    *("save_steps", "num_workers", "keep_rows"),
)


class PhaseLog(TypedDict):
    """What is noted of a finished phase: `log` is that of the trainer."""

    name: str
    steps: int
    seconds: float
    log: list[dict[str, float]]


def note(name: str, steps: int, log: list[dict[str, float]]) -> PhaseLog:
    """What is noted of a finished phase."""
    return {"name": name, "steps": steps, "seconds": seconds_spent(log), "log": log}


class MuonSFTTrainer(MuonMixin, VoCoSFTTrainer):
    """[`VoCoSFTTrainer`] with [`MuonWithAdamW`]."""


def train(recipe: Recipe, work_dir: Path, compile: bool = True) -> None:
    """
    Trains the model of a recipe, phase after phase; what an interrupted run has left in `work_dir` is kept.

    Args:
        recipe ([`Recipe`]): What to train.
        work_dir (`Path`): Folder of checkpoints and logs.
        compile (`bool`, *optional*, defaults to `True`): Whether to compile the layers, which needs a C++ compiler.

    Raises:
        ValueError: if `work_dir` holds a training of another recipe.
    """
    previous = train_tower(recipe, work_dir, compile)
    for phase in recipe.phases:
        previous = train_phase(recipe, phase, work_dir, compile, previous)


def final_dir(work_dir: Path, name: str) -> Path:
    """Folder of the model, the processor and the log at the end of a phase."""
    return work_dir / f"{name}-final"


def train_tower(recipe: Recipe, work_dir: Path, compile: bool) -> Path:
    """Makes the model and trains its vision tower alone, unless that is done. Returns the folder of the result."""
    folder, final = work_dir / VISION, final_dir(work_dir, VISION)
    made = made_of(recipe.start and Path(recipe.start), common(recipe))
    if is_made(final, made):
        return final
    claim(folder, made)
    processor = build_processor(recipe)
    model = build_model(processor, recipe)
    if compile:
        compile_layers(model)
    tower = model.model.vision_tower
    log = train_vision_tower(tower, processor.image_processor, recipe, folder)
    save_phase(model, processor, note(VISION, recipe.vision_steps, log), folder, final)
    return final


def train_phase(recipe: Recipe, phase: Phase, work_dir: Path, compile: bool, previous: Path) -> Path:
    """
    Trains what the phase before has left in `previous`, unless that is done. Returns the folder of the result.

    Raises:
        ValueError: if there is one of another training.
    """
    folder, final = work_dir / phase.name, final_dir(work_dir, phase.name)
    made = made_of(previous, common(recipe), phase)
    if is_made(final, made):
        return final
    claim(folder, made)
    processor = VoCoLlamaProcessor.from_pretrained(previous)
    # A new one each time: accelerate's mixed precision stays off for a model that it has prepared before
    model = VoCoLlamaForConditionalGeneration.from_pretrained(
        previous, dtype=torch.float32, attn_implementation=recipe.attention
    )
    weights = deepcopy(model.state_dict())
    if phase.videos:
        torch.manual_seed(recipe.seed)  # of new words
        add_tokens(processor, WORDS)
        model.resize_token_embeddings(len(processor.tokenizer))
    if compile:
        compile_layers(model, with_attention=not phase.two_stages)
    log = run_phase(make_trainer(model, processor, recipe, phase, folder))
    average_weights(model, weights, phase.share)
    save_phase(model, processor, note(phase.name, phase.steps, log), folder, final)
    return final


def common(recipe: Recipe) -> Recipe:
    """What of a recipe decides how each of its phases ends, and the rest as by default."""
    default = Recipe(phases=())
    return replace(recipe, **{name: getattr(default, name) for name in NOT_DECISIVE})


def make_trainer(
    model: PreTrainedModel,
    processor: VoCoLlamaProcessor,
    recipe: Recipe,
    phase: Phase,
    output_dir: Path,
    distillation_weight: float = 0.0,
    distillation_temperature: float = 1.0,
    teacher: str = "self",
    train_dataset: Dataset | None = None,
) -> MuonSFTTrainer:
    """
    The trainer of a phase, with its data, or with rows of the caller; `distillation_weight`, `teacher` and
    `distillation_temperature` are those of [`VoCoSFTConfig`].
    """
    recipe = recipe.for_phase(phase)
    args = VoCoSFTConfig(
        **training_options(recipe, phase, output_dir),
        gradient_checkpointing=False,
        num_voco_tokens=list(phase.num_voco_tokens),
        two_stages=phase.two_stages,
        draws_per_step=phase.draws,
        freeze=list(phase.freeze),
        assistant_only_loss=True,
        max_length=None,
        pad_to_multiple_of=8,
        distillation_weight=distillation_weight,
        distillation_temperature=distillation_temperature,
        teacher=teacher,
    )
    collator = SingleQuestionCollator(processor, max(1, *phase.num_voco_tokens), phase.per_tile)
    return MuonSFTTrainer(
        model,
        args,
        data_collator=collator if phase.single else None,
        train_dataset=phase_rows(recipe, phase, "train") if train_dataset is None else train_dataset,
        eval_dataset=phase_rows(recipe, phase, "validation"),
        processing_class=processor,
    )


def training_options(recipe: Recipe, phase: Phase, output_dir: Path) -> dict[str, Any]:
    """Arguments of [`~transformers.TrainingArguments`] for a phase of `recipe`, see [`Recipe.for_phase`]."""
    # Half as many rows, half of which have eight images
    batch_size = recipe.batch_size // (1 + phase.videos)
    decays = phase.scheduler == "warmup_stable_decay"
    return {
        **phase_options(recipe, output_dir, phase.steps, batch_size, phase.evaluations),
        "learning_rate": phase.learning_rate,
        "lr_scheduler_type": phase.scheduler,
        "lr_scheduler_kwargs": {"num_decay_steps": round(phase.decay * phase.steps)} if decays else {},
    }


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a saved model in float32."""
    return {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}


def average_weights(model: PreTrainedModel, earlier: dict[str, torch.Tensor], share: float) -> None:
    """Weights of the model by `share`, and otherwise earlier ones; rows that they did not have stay."""
    for name, weight in model.state_dict().items():
        old = earlier[name].to(weight)
        weight[: len(old)].lerp_(old, 1 - share)


def compile_layers(model: PreTrainedModel, with_attention: bool = True) -> None:
    """
    Compiles the layers of the language model and of the vision tower in place; `with_attention=False` for passes that
    keep what attention computed in a cache, which is compiled anew for every layer.
    """
    for layer in model.model.vision_tower.encoder.layers:
        layer.compile(dynamic=True)
    for layer in model.model.language_model.layers:
        for part in (layer,) if with_attention else (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(dynamic=True)


def save_phase(
    model: PreTrainedModel, processor: VoCoLlamaProcessor, log: PhaseLog, folder: Path, final: Path
) -> None:
    """Writes what a phase has left, all or nothing, and removes the `folder` that it was trained in."""
    with new_folder(final) as part:
        model.save_pretrained(part)
        processor.save_pretrained(part)
        (part / "log.json").write_text(json.dumps(log))
        shutil.copy(folder / MADE_OF, part)
    shutil.rmtree(folder)


def load_trained(folder: Path) -> VoCoLlamaForConditionalGeneration:
    """A model to ask, in float32, the precision that is the same everywhere."""
    model = VoCoLlamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.to(default_device()).eval()
