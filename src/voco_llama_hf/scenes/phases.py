"""What the phases that train the embedded checkpoint have in common: how they report, save and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..training.checkpoints import last_checkpoint


def phase_options(output_dir: Path, steps: int, batch_size: int, seed: int) -> dict[str, Any]:
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
        "remove_unused_columns": False,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_pin_memory": False,
        "logging_steps": min(20, every),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": every,
        "save_total_limit": 1,
        "seed": seed,
        "report_to": "none",
    }


def run_phase(trainer: Trainer) -> list[dict]:
    """Trains, from the last checkpoint in the trainer's folder where there is one. Returns the log."""
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    return trainer.state.log_history
