"""What all phases have in common: how they report, save and resume."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from .recipe import Recipe


def phase_options(
    recipe: Recipe, output_dir: Path, steps: int, batch_size: int
) -> dict[str, str | int | float | bool]:
    """Arguments of [`~transformers.TrainingArguments`] for a phase that evaluates and saves as it goes."""
    every = min(250, max(1, steps // 2))
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "warmup_steps": min(100, steps // 5),
        "weight_decay": 0.05,
        "bf16": True,
        # Without an accelerator there is no other device, but bfloat16 asks for it to be said
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        "dataloader_num_workers": recipe.num_workers,
        "dataloader_persistent_workers": recipe.num_workers > 0,
        "dataloader_pin_memory": False,
        "logging_steps": min(20, every),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": min(recipe.save_steps, every),
        "save_total_limit": 2,
        "seed": recipe.seed,
        "report_to": "none",
    }


def run_phase(trainer: Trainer) -> list[dict]:
    """Trains, from the last checkpoint in the trainer's folder where there is one. Returns the log."""
    folder = trainer.args.output_dir
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)
    return trainer.state.log_history
