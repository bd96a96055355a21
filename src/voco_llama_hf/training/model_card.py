"""What a trainer knows of its own run, for the model card."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
import trl
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel

from ..hub import eval_result, make_card
from ..hub.card import save_card
from ..loading import is_hub_id
from .distillation import bare


if TYPE_CHECKING:
    from .sft_config import VoCoSFTConfig
    from .sft_trainer import VoCoSFTTrainer


DATA_SUFFIXES = (".arrow", ".csv", ".json", ".jsonl", ".parquet")
EVALUATED = {"eval_loss": ("loss", 1), "eval_mean_token_accuracy": ("token_accuracy", 100)}


def write_training_card(
    trainer: VoCoSFTTrainer,
    model_name: str | None,
    dataset_name: str | None,
    tags: list[str],
    eval_dataset_name: str | None,
    eval_split: str,
) -> Path:
    """Writes the card of what [`VoCoSFTTrainer`] trains to its output folder, or refreshes the one that is there."""
    args, config = trainer.args, bare(trainer.model).config
    folder = Path(args.output_dir)
    path = folder / REPOCARD_NAME
    is_adapter = isinstance(trainer.model, PeftModel)
    origin = config._name_or_path
    card = make_card(
        config,
        trainer.processing_class,
        trainer.hub_model_id or folder.absolute().name,
        ModelCard.load(path) if path.is_file() else None,
        name=model_name or folder.absolute().name,
        base_model=origin if origin and is_hub_id(origin) and not os.path.isdir(origin) else None,
        base_model_relation="finetune" if not is_adapter else None,
        is_adapter=is_adapter,
        ships_code=not is_adapter,
        datasets=[dataset_name] if dataset_name is not None and is_on_hub(dataset_name) else [],
        tags=tags,
        eval_results=training_results(trainer, eval_dataset_name, eval_split),
        training=training_text(trainer),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return save_card(card, folder)


def is_on_hub(name: str) -> bool:
    """Whether a name of data can be one of the Hub, and not a path, even one that is of another machine or gone."""
    is_path = os.path.exists(name) or name.count("/") != 1 or Path(name).suffix in DATA_SUFFIXES
    return not is_path and is_hub_id(name)


@contextmanager
def without_automatic_card(folder: Path) -> Iterator[None]:
    """Keeps the card of a folder as it is, or its lack, whatever saving adapters writes there."""
    path = folder / REPOCARD_NAME
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None:
        path.write_bytes(before)
    else:
        path.unlink(missing_ok=True)


def training_results(trainer: VoCoSFTTrainer, dataset_name: str | None, split: str) -> list[EvalResult]:
    """Figures of the last evaluation on the data that are named; one that came to no number is none."""
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    choices = trainer.args.choices or [bare(trainer.model).config.num_voco_tokens]
    if dataset_name is None or not evaluated:
        return []
    per_tile = trainer.args.num_voco_tokens_per_tile is not None
    # A path says more of this machine than of the data
    label = dataset_name if is_on_hub(dataset_name) else Path(dataset_name).name
    # An evaluation reads with the first choice
    return [
        eval_result(label, metric, scale * evaluated[-1][key], choices[0] or None, split=split, per_tile=per_tile)
        for key, (metric, scale) in EVALUATED.items()
        if math.isfinite(evaluated[-1].get(key, math.nan))
    ]


def training_text(trainer: VoCoSFTTrainer) -> str:
    """Markdown: a table of how it was trained and what came out."""
    args, state = trainer.args, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [entry for entry in state.log_history if "eval_loss" in entry]
    batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    choices = [str(k or "uncompressed") for k in args.choices or []]
    of_tiles = "" if args.num_voco_tokens_per_tile is None else " of every tile"
    adapters = trainer.model.peft_config["default"].peft_type.value if isinstance(trainer.model, PeftModel) else None
    # Of a path, the name
    teacher = Path(args.teacher).absolute().name if os.path.isdir(args.teacher) else args.teacher
    distillation = f"weight {args.distillation_weight}, teacher `{teacher}`" if args.distillation_weight else None
    rows = {
        "method": "supervised fine-tuning under the VoCo mask, with [TRL](https://github.com/huggingface/trl)",
        "adapters": adapters,
        f"VoCo tokens{of_tiles}, drawn for every step": ", ".join(choices) or None,
        "numbers in a step": f"{args.draws_per_step}" if args.draws_per_step > 1 else None,
        "distillation": distillation,
        "not trained": ", ".join(f"`{name}`" for name in args.freeze) or None,
        "steps": f"{state.global_step:,}",
        "epochs": f"{state.epoch:.2f}" if state.epoch else None,
        "examples a step": f"{batch_size:,}",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}",
        "training loss, last logged": f"{losses[-1]:.4f}" if losses else None,
        "evaluation loss": f"{evaluated[-1]['eval_loss']:.4f}" if evaluated else None,
        "hardware": hardware(args),
        "versions": f"transformers {transformers.__version__}, TRL {trl.__version__}, PyTorch {torch.__version__}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def hardware(args: VoCoSFTConfig) -> str:
    """What the run was trained on."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    return f"{args.world_size} x {name}"
