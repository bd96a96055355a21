"""What all phases have in common: how they report, save and resume."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from ..training.checkpoints import last_checkpoint
from ..training.precision import is_bfloat16_fast
from .recipe import Recipe


def phase_options(
    recipe: Recipe, output_dir: Path, steps: int, batch_size: int, evaluations: int | None = None
) -> dict[str, str | int | float | bool]:
    """Arguments of [`~transformers.TrainingArguments`] for a phase that evaluates and saves as it goes."""
    # Rows are drawn by closures, which only a fork inherits
    workers = recipe.num_workers if torch.multiprocessing.get_start_method() == "fork" else 0
    every = min(250, max(1, steps // 2)) if evaluations is None else max(1, steps // evaluations)
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "warmup_steps": min(100, steps // 5),
        "weight_decay": 0.05,
        "bf16": is_bfloat16_fast(),
        # Without an accelerator there is no other device, but bfloat16 asks for it to be said
        "use_cpu": not torch.accelerator.is_available(),
        "remove_unused_columns": False,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "dataloader_pin_memory": False,
        "logging_steps": min(20, every),
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_steps": min(recipe.save_steps, every),
        "save_total_limit": 2,
        "seed": recipe.seed,
        "report_to": "none",
    }


class Clock(TrainerCallback):
    """Notes in the log how many seconds the training has taken so far, those before an interruption with them."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.start = time.monotonic() - seconds_spent(state.log_history)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        state.log_history[-1]["seconds"] = round(time.monotonic() - self.start, 3)


def seconds_spent(log: list[dict[str, float]]) -> float:
    """Seconds that a training has taken, by the log of its trainer."""
    return max((entry["seconds"] for entry in log if "seconds" in entry), default=0.0)


def run_phase(trainer: Trainer) -> list[dict[str, float]]:
    """Trains, from the last whole checkpoint in the trainer's folder where there is one. Returns the log."""
    checkpoint = last_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        # Only its result was not written; the trainer would take one step more
        if state.global_step >= trainer.args.max_steps:
            trainer.model.load_state_dict(load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME))
            return state.log_history
    trainer.add_callback(Clock())
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.log_history
