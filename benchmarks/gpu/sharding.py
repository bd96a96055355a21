"""FSDP2 and ZeRO-3 on one process: the embedded checkpoint is trained on, with the losses of a plain training."""

from __future__ import annotations

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from voco_llama_cli import train_script
from voco_llama_cli.train import launch, resolve_shipped

from .record import Failed, Missing, Parts
from .setting import Setting


STEPS = 6
TOLERANCE = 0.1  # of the loss, since weights are rounded to bfloat16 at other places


def run(parts: Parts, setting: Setting) -> None:
    for name in ("fsdp2", "zero3"):
        parts.run(name, partial(train, setting, name))
    if setting.dry_run:
        parts.run("launched", partial(train, setting, "launched"))


def train(setting: Setting, name: str) -> dict[str, object]:
    """
    Losses of a plain training and of a sharded one.

    Raises:
        Missing: if DeepSpeed is not here, or no accelerator, which accelerate shards on alone.
        Failed: if it does not run, or the losses differ.
    """
    if name == "zero3" and find_spec("deepspeed") is None:
        raise Missing("deepspeed is not installed")
    if name == "fsdp2" and setting.dry_run:
        raise Missing("accelerate shards on accelerators only")
    plain = plain_losses(setting)
    output = setting.work_dir / f"sharded-{name}"
    shutil.rmtree(output, ignore_errors=True)
    config = str(single_process(setting)) if name == "launched" else name
    args = [*options(setting, output), "--accelerate_config", config, "--num_processes", "1"]
    args += setting.pick([], ["--cpu", "--mixed_precision=no"])
    args = resolve_shipped(resolve_shipped(args, "--config", "recipes"), "--accelerate_config", "accelerate_configs")
    try:
        launch(args)
    except SystemExit as error:  # how accelerate says that a process of its own failed
        raise Failed(
            f"voco-llama train --accelerate_config {name} ended with code {error.code}: see the log"
        ) from error
    losses = read_losses(output)
    shutil.rmtree(output, ignore_errors=True)
    result = {"losses": losses, "plain_losses": plain}
    if len(losses) != len(plain) or any(abs(a - b) > TOLERANCE * abs(b) for a, b in zip(losses, plain)):
        raise Failed(f"losses {losses}, those of a plain training {plain}", result)
    return result


def options(setting: Setting, output: Path) -> list[str]:
    steps = setting.pick(STEPS, 1)
    values = {
        "config": "tiny",
        "num_scenes": 64,
        "num_voco_tokens": 2,
        "distillation_weight": 0.5,
        "max_steps": steps,
        "per_device_train_batch_size": setting.pick(8, 2),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": steps,
        "output_dir": output,
        "use_cpu": setting.dry_run,
        "bf16": not setting.dry_run,
        "dtype": "float32",
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def plain_losses(setting: Setting) -> list[float]:
    """The losses of a training in one process without accelerate's launcher."""
    output = setting.work_dir / "plain"
    if not output.is_dir():
        train_script.train(resolve_shipped(options(setting, output), "--config", "recipes"))
    return read_losses(output)


def read_losses(output: Path) -> list[float]:
    (state,) = output.glob("checkpoint-*/trainer_state.json")
    return [entry["loss"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def single_process(setting: Setting) -> Path:
    """A configuration of accelerate that shards nothing, for where it cannot."""
    path = setting.work_dir / "single.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\n")
    return path
