"""The recipes for one card of 24 GB: twenty steps of each on rows as long as they may be, under that limit."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from voco_llama_cli import train_script
from voco_llama_cli.train import resolve_shipped
from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaProcessor
from voco_llama_hf.benchmark.presets import build_model
from voco_llama_hf.files import new_folder
from voco_llama_hf.modeling import VoCoLlamaConfig
from voco_llama_hf.scenes import make_scenes

from .networks import SMALL_CARD, free_memory, load_shape, memory_limit, peak_memory, preset
from .record import Failed, Missing, Parts
from .setting import Setting


STEPS = 20
NUM_ROWS, NUM_TURNS = 96, 480  # turns enough for the longest rows that the recipes let through


def run(parts: Parts, setting: Setting) -> None:
    for recipe in ("lora-24gb", "qlora-24gb"):
        parts.run(recipe, partial(train, setting, recipe))


def train(setting: Setting, recipe: str) -> dict[str, object]:
    """
    Peak bytes, seconds a step and losses. Gradients are not accumulated, which takes no memory but many minutes.

    Raises:
        Missing: if the recipe needs bitsandbytes.
        Failed: if a loss is no number.
    """
    if recipe.startswith("qlora") and find_spec("bitsandbytes") is None:
        raise Missing("bitsandbytes is not installed")
    steps = setting.pick(STEPS, 1)
    data, output = make_data(setting), setting.work_dir / recipe
    shutil.rmtree(output, ignore_errors=True)
    options = {
        "model_name_or_path": setting.model or make_model(setting),
        "dataset_name": data,
        "image_folder": data.parent,
        "output_dir": output,
        "max_steps": steps,
        "gradient_accumulation_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        **setting.pick({}, {"use_cpu": True, "dataloader_num_workers": 0, "per_device_train_batch_size": 1}),
    }
    args = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    with memory_limit(SMALL_CARD):
        trainer = train_script.train(resolve_shipped(["--config", recipe, *args], "--config", "recipes"))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (runtime,) = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
        result = {
            "steps": steps,
            "batch_size": trainer.args.per_device_train_batch_size,
            "max_length": trainer.args.max_length,
            "seconds_a_step": runtime / steps,  # the first, which warms up, with the others
            "peak_bytes": peak_memory(),
            "limit_gib": SMALL_CARD,
            "losses": losses,
        }
        del trainer
        free_memory()
    shutil.rmtree(output, ignore_errors=True)
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        raise Failed(f"losses of {steps} steps: {losses}", result)
    return result


def make_model(setting: Setting) -> Path:
    """A folder with random weights of the shape, which reads with the tokenizer of the embedded checkpoint."""
    folder = setting.work_dir / f"random-{preset(setting)}"
    if folder.is_dir():
        return folder
    processor = VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    config = with_tokens_of(processor, load_shape(setting))
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    processor.image_processor.crop_size = {"height": size, "width": size}
    model: PreTrainedModel = build_model(config, setting.device, torch.bfloat16)
    with new_folder(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
    del model
    free_memory()
    return folder


def with_tokens_of(processor: VoCoLlamaProcessor, config: VoCoLlamaConfig) -> VoCoLlamaConfig:
    """A configuration whose special tokens are those of the embedded checkpoint."""
    embedded = VoCoLlamaConfig.from_pretrained(EMBEDDED_CHECKPOINT)
    for name in ("voco_token_id", "vision_prefix_token_ids", "vision_suffix_token_ids"):
        setattr(config, name, getattr(embedded, name))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(embedded.text_config, name))
    return config


def make_data(setting: Setting) -> Path:
    """A file in LLaVA's format, of rows that are longer than a recipe lets through."""
    folder = setting.work_dir / "rows"
    if not (folder / "data.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as aside:
            rows = []
            for index, scene in enumerate(make_scenes("train", setting.pick(NUM_ROWS, 2), seed=0)):
                scene["image"].save(aside / f"{index}.png")
                names = {"user": "human", "assistant": "gpt"}
                turns = [
                    {"from": names[turn["role"]], "value": turn["content"]}
                    for turn in scene["messages"]
                    if turn["role"] in names
                ]
                turns = (turns * NUM_TURNS)[:NUM_TURNS]
                turns[0] = {**turns[0], "value": f"<image>\n{turns[0]['value']}"}
                rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
            (aside / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"
