"""What `voco-llama train` runs, on its own or on every process that accelerate launches."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import IterableDataset, load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from voco_llama_hf.scenes.still import SPLITS, make_scenes
from voco_llama_hf.training.checkpoints import last_checkpoint
from voco_llama_hf.training.llava_data import load_llava_data
from voco_llama_hf.training.sft_config import OWN_TEACHERS, VoCoSFTConfig
from voco_llama_hf.training.sft_trainer import VoCoSFTTrainer

from .loading import find_model


SCENES = "voco-scenes"
LLAVA_SUFFIXES = (".json", ".jsonl")


@dataclass
class DataArguments(ScriptArguments):
    """
    Where the data come from: the arguments of TRL's scripts, and

    Args:
        dataset_name (`str`):
            A data set on the Hub, a folder that `datasets` has saved or can load, a `.json` or `.jsonl` file in
            LLaVA's format, or `"voco-scenes"` for the procedural scenes.
        eval_dataset_name (`str`, *optional*):
            Data to evaluate on, of the same kinds; by default the split `dataset_test_split` of `dataset_name`.
        test_size (`float`, *optional*):
            Share of the rows that are held out for the evaluation, or their number if it is 1 or more.
        image_folder (`str`, *optional*):
            Folder that the paths of images and videos of LLaVA's format start from; that of the file by default.
        num_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video of LLaVA's format.
        max_bad_rows (`int`, *optional*, defaults to 100):
            Rows of LLaVA's format that may be left out because they cannot be read.
        num_scenes (`int`, *optional*, defaults to 10000):
            Number of procedural scenes.
    """

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Data to evaluate on, instead of a split of dataset_name."}
    )
    test_size: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to hold out for the evaluation, or their number if it is 1 or more."},
    )
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that the paths of images and videos of LLaVA's format start from."}
    )
    num_frames: int = field(default=8, metadata={"help": "Frames sampled from a video of LLaVA's format."})
    max_bad_rows: int = field(
        default=100, metadata={"help": "Rows of LLaVA's format that may be left out because they cannot be read."}
    )
    num_scenes: int = field(default=10_000, metadata={"help": "Number of procedural scenes."})

    @property
    def held_out(self) -> float | int | None:
        """`test_size` as `datasets` takes it."""
        return self.test_size if self.test_size is None or self.test_size < 1 else int(self.test_size)


class Parser(TrlParser):
    """Raises where argparse would print the names of several hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> Parser:
    """Every field of the three is a flag, and a key of the file that `--config` names."""
    return Parser((DataArguments, VoCoSFTConfig, ModelConfig), prog="voco-llama train")


def load_data(arguments: DataArguments, seed: int, evaluates: bool) -> tuple[Any, Any]:
    """
    The data to train on and, if `evaluates`, those to evaluate on, of which no row is trained on.

    Raises:
        ValueError: if no data are named, there is no such split, or none that is not trained on.
    """
    name, own_eval = arguments.dataset_name, arguments.eval_dataset_name
    if name is None:
        raise ValueError("name the data with --dataset_name: a data set, a folder, or a file in LLaVA's format")
    if arguments.held_out is not None:
        if own_eval is not None:
            raise ValueError("evaluate either on --eval_dataset_name or on the rows that --test_size holds out")
        parts = hold_out(name, arguments, seed)
        return parts["train"], parts["test"] if evaluates else None
    train_split, test_split = arguments.dataset_train_split, arguments.dataset_test_split
    eval_name = own_eval or name
    if evaluates and os.path.realpath(eval_name) == os.path.realpath(name):
        if name.endswith(LLAVA_SUFFIXES):
            raise ValueError(
                f"all of {name} is trained on: name other data to evaluate on with --eval_dataset_name, or hold rows "
                "out with --test_size"
            )
        if test_split == train_split:
            raise ValueError(f"the split {train_split!r} of {name} cannot be evaluated on: it is trained on")
    train_dataset = load_split(name, arguments, train_split, "train", seed)
    return train_dataset, load_split(eval_name, arguments, test_split, "test", seed) if evaluates else None


def hold_out(name: str, arguments: DataArguments, seed: int) -> Any:
    """A part `train` and a part `test` of the data to train on."""
    if name.endswith(LLAVA_SUFFIXES):
        check_split(name, arguments.dataset_train_split, ["train"])
        return load_llava(name, arguments, seed, arguments.held_out)
    whole = load_split(name, arguments, arguments.dataset_train_split, "train", seed)
    if isinstance(whole, IterableDataset):
        raise ValueError("--test_size needs to know all rows: it does not go with --dataset_streaming")
    return whole.train_test_split(test_size=arguments.held_out, seed=seed)


def load_split(name: str, arguments: DataArguments, split: str, only_split: str, seed: int) -> Any:
    """
    One split of the data `name`; of a file in LLaVA's format there is `only_split`.

    Raises:
        ValueError: if there is no such split.
    """
    if name == SCENES:
        check_split(name, split, SPLITS)
        return make_scenes(split, arguments.num_scenes, seed=seed).select_columns(["image", "messages"])
    if name.endswith(LLAVA_SUFFIXES):
        check_split(name, split, [only_split])
        return load_llava(name, arguments, seed)
    if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        loaded: Any = load_from_disk(name)
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    else:
        splits = load_dataset(name, name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    check_split(name, split, splits)
    return splits[split]


def check_split(name: str, split: str, splits: Iterable[str]) -> None:
    """
    Raises:
        ValueError: if there is no such split.
    """
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}, it has {', '.join(splits)}")


def load_llava(name: str, arguments: DataArguments, seed: int, held_out: float | int | None = None) -> Any:
    return load_llava_data(
        name, arguments.image_folder, arguments.max_bad_rows, arguments.num_frames, test_size=held_out, seed=seed
    )


def evaluated_on(arguments: DataArguments) -> dict[str, str | None]:
    """What a card calls the data of the evaluation."""
    split = arguments.dataset_test_split if arguments.held_out is None else "test"
    return {"eval_dataset_name": arguments.eval_dataset_name or arguments.dataset_name, "eval_split": split}


def adapters(arguments: ModelConfig, config: VoCoSFTConfig) -> Any:
    """The PEFT configuration that the flags describe; modules that are frozen get no adapters."""
    peft_config = get_peft_config(arguments)
    if peft_config is None:
        return None
    # TRL's default names a class of text models; without it the adapters note ours, for AutoPeftModel to find
    peft_config.task_type = None
    if config.freeze:
        peft_config.exclude_modules = rf"(.*\.)?({'|'.join(map(re.escape, config.freeze))})\..*"
    return peft_config


def find_checkpoint(config: VoCoSFTConfig) -> str | None:
    """
    Where to resume: a path as it is, and `"true"` as the last whole checkpoint of the output folder, if there is one.
    """
    if str(config.resume_from_checkpoint).lower() not in ("true", "last"):
        return config.resume_from_checkpoint
    return last_checkpoint(config.output_dir)


def main(args: list[str] | None = None) -> None:
    """Trains as the flags in `args` (by default those of the process) and the file behind `--config` say."""
    train(args)


def train(args: list[str] | None = None) -> VoCoSFTTrainer:
    """[`main`], for who wants to look at the trainer afterwards."""
    data, config, model = make_parser().parse_args_and_config(args, fail_with_unknown_args=True)
    if model.model_name_or_path is None:
        raise ValueError("name the model to train with --model_name_or_path")
    name = find_model(model.model_name_or_path)
    if config.teacher not in OWN_TEACHERS:
        config.teacher = find_model(config.teacher)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    train_dataset, eval_dataset = load_data(data, config.seed, evaluates=config.eval_strategy != "no")
    trainer = VoCoSFTTrainer(
        name,
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=adapters(model, config),
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(config))
    trainer.save_model(config.output_dir)
    card = {"dataset_name": data.dataset_name, **evaluated_on(data)}
    trainer.create_model_card(**card)
    trainer.accelerator.print(f"Saved to {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub(**card)
    trainer.end()
    return trainer


if __name__ == "__main__":
    main()
