"""What `voco-llama train` runs, on its own or on every process that accelerate launches."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset, IterableDataset, load_dataset, load_from_disk
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from voco_llama_hf.scenes.still import make_scenes
from voco_llama_hf.training.checkpoints import last_checkpoint
from voco_llama_hf.training.llava_data import load_llava_data
from voco_llama_hf.training.sft_config import VoCoSFTConfig
from voco_llama_hf.training.sft_trainer import VoCoSFTTrainer

from .loading import find_model


EMBEDDED = "voco-scenes-tiny"
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
        image_folder (`str`, *optional*):
            Folder that the paths of images and videos of LLaVA's format start from; that of the file by default.
        num_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video of LLaVA's format.
        max_bad_rows (`int`, *optional*, defaults to 100):
            Rows of LLaVA's format that may be left out because they cannot be read.
        shuffle_buffer_size (`int`, *optional*, defaults to 10000):
            Rows of LLaVA's format to draw the next one from.
        num_scenes (`int`, *optional*, defaults to 10000):
            Number of procedural scenes.
    """

    image_folder: str | None = field(
        default=None, metadata={"help": "Folder that the paths of images and videos of LLaVA's format start from."}
    )
    num_frames: int = field(default=8, metadata={"help": "Frames sampled from a video of LLaVA's format."})
    max_bad_rows: int = field(
        default=100, metadata={"help": "Rows of LLaVA's format that may be left out because they cannot be read."}
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata={"help": "Rows of LLaVA's format to draw the next one from."}
    )
    num_scenes: int = field(default=10_000, metadata={"help": "Number of procedural scenes."})


class Parser(TrlParser):
    """Raises where argparse would print the names of several hundred flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def make_parser() -> Parser:
    """Every field of the three is a flag, and a key of the file that `--config` names."""
    return Parser((DataArguments, VoCoSFTConfig, ModelConfig), prog="voco-llama train")


def load_split(arguments: DataArguments, split: str, seed: int) -> Dataset | IterableDataset:
    """
    One split of the data that `arguments` name.

    Raises:
        ValueError: if no data are named, or there is no such split.
    """
    name = arguments.dataset_name
    if name is None:
        raise ValueError("name the data with --dataset_name: a data set, a folder, or a file in LLaVA's format")
    if name == SCENES:
        columns = ["image", "messages"]
        return make_scenes(split, arguments.num_scenes, seed=seed).select_columns(columns)
    if name.endswith(LLAVA_SUFFIXES):
        return load_llava_data(
            name,
            arguments.image_folder,
            arguments.max_bad_rows,
            arguments.shuffle_buffer_size,
            seed,
            arguments.num_frames,
        )
    if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        loaded: Any = load_from_disk(name)
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    else:
        splits = load_dataset(name, name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}, it has {', '.join(splits)}")
    return splits[split]


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
    Where to resume: a path as it is, and `"true"` as the last checkpoint of the output folder, if there is one.
    """
    if str(config.resume_from_checkpoint).lower() not in ("true", "last"):
        return config.resume_from_checkpoint
    return last_checkpoint(config.output_dir)


def main(args: list[str] | None = None) -> None:
    """Trains as the flags in `args` (by default those of the process) and the file behind `--config` say."""
    data, config, model = make_parser().parse_args_and_config(args, fail_with_unknown_args=True)
    if model.model_name_or_path is None:
        raise ValueError("name the model to train with --model_name_or_path")
    name = find_model(None if model.model_name_or_path == EMBEDDED else model.model_name_or_path)
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    train_dataset = load_split(data, data.dataset_train_split, config.seed)
    has_evaluation = config.eval_strategy != "no"
    trainer = VoCoSFTTrainer(
        name,
        config,
        train_dataset=train_dataset,
        eval_dataset=load_split(data, data.dataset_test_split, config.seed) if has_evaluation else None,
        quantization_config=get_quantization_config(model),
        peft_config=adapters(model, config),
    )
    trainer.train(resume_from_checkpoint=find_checkpoint(config))
    trainer.save_model(config.output_dir)
    trainer.create_model_card(dataset_name=data.dataset_name)
    trainer.accelerator.print(f"Saved to {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
