"""`voco-llama train`: supervised fine-tuning from a recipe and flags, on one device or many."""

from __future__ import annotations

from pathlib import Path

import typer

from .errors import UsageProblem
from .loading import PACKAGE
from .options import check_train_extra


TRAIN_EXTRA = ("datasets", "ijson", "peft", "trl")
# Everything is TRL's parser's, --help too
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> None:
    """Train a model with TRL: every field of VoCoSFTConfig and TRL's ModelConfig is a flag.

    voco-llama train --config lora-24gb --model_name_or_path MODEL --dataset_name data.json --output_dir OUTPUT

    --config takes a YAML file or the name of a recipe of this package (paper, lora-24gb, qlora-24gb, tiny).
    --accelerate_config takes a YAML file or ddp, fsdp2 or zero3, and launches one process a device; further flags of
    accelerate launch (--num_processes 8) may follow.
    """
    check_train_extra("train", TRAIN_EXTRA)
    args = resolve_shipped(context.args, "--config", "recipes")
    args = resolve_shipped(args, "--accelerate_config", "accelerate_configs")
    if "--accelerate_config" not in args:
        from .train_script import main

        return main(args)
    launch(args)


def resolve_shipped(args: list[str], option: str, folder: str) -> list[str]:
    """
    Turns the name of a file in a `folder` of a part of this package, as the value of `option`, into its path.

    Raises:
        UsageProblem: if the value is missing, or neither a file nor such a name.
    """
    # Both --option value and --option=value
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith(f"{option}=") else [arg])]
    if option not in args:
        return args
    index = args.index(option) + 1
    if index == len(args):
        raise UsageProblem(f"{option} needs a value")
    if not Path(args[index]).is_file():
        shipped = {path.stem: path for path in PACKAGE.glob(f"*/{folder}/*.yaml")}
        if args[index] not in shipped:
            names = ", ".join(sorted(shipped))
            raise UsageProblem(f"{option} takes a YAML file or one of {names}, got {args[index]!r}")
        args = [*args[:index], str(shipped[args[index]]), *args[index + 1 :]]
    return args


def launch(args: list[str]) -> None:
    """Runs the training script on the processes that the accelerate configuration in `args` asks for."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    from .train_script import make_parser

    index = args.index("--accelerate_config")
    config, args = args[index + 1], [*args[:index], *args[index + 2 :]]
    # What is no flag of the training is one of accelerate
    *_, from_file, launch_args = make_parser().parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    if from_file:
        raise UsageProblem(f"the recipe has unknown keys: {' '.join(from_file)}")
    own, left = [], list(launch_args)
    for arg in args:
        if left and arg == left[0]:
            left.pop(0)
        else:
            own.append(arg)
    flags = ["--quiet", "--config_file", config, *launch_args, "--module", "voco_llama_cli.train_script", *own]
    launch_command(launch_command_parser().parse_args(flags))
