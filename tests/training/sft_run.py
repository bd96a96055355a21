"""Trains a tiny model as a process of its own: `python sft_run.py OUTPUT_DIR '{"max_steps": 4}' '{"kill_at": 3}'`."""

import json
import os
import signal
import sys
import weakref
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from datasets import disable_progress_bars
from training.sft_helpers import conversations, losses, make_trainer
from transformers import TrainerCallback


class Kill(TrainerCallback):
    """Ends the process as `kill -9` does, at the end of a step, when the checkpoint of an earlier one is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(output_dir, options, kill_at=0, resume=False):
    disable_progress_bars()
    dataset = conversations(16, images_per_row=(1, 2, 1, 0))
    callbacks = [Kill(kill_at)] if kill_at else None
    trainer = make_trainer(output_dir, dataset=dataset, callbacks=callbacks, **options)
    trainer.train(resume_from_checkpoint=resume or None)
    wrapped = weakref.ref(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        parts = {key: losses(trainer, key) for key in ("loss", "nll_loss", "distillation_loss", "grad_norm")}
        (Path(output_dir) / "losses.json").write_text(json.dumps(parts))
    trainer.end()
    # Else it would take the process group down with it, at a moment at which that can hang
    assert wrapped() is trainer.model or wrapped() is None or trainer.is_deepspeed_enabled


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), **(json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}))
