"""The finished checkpoint: its weights, its results on validation and test, its pictures and its card."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ..hub import write_card
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from .card import model_card
from .evaluation import evaluate_scenes
from .phases import VISION, PhaseLog, final_dir, load_trained
from .recipe import Recipe
from .video_evaluation import evaluate_videos


def plot_training(logs: list[PhaseLog], path: Path) -> None:
    """Draws loss and validation accuracy of all phases over their steps, one behind the other."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panel = figure.subplots()
    accuracy = panel.twinx()
    start = 0
    for i, log in enumerate(logs):
        train = [(start + entry["step"], entry["loss"]) for entry in log["log"] if "loss" in entry]
        valid = [
            (start + entry["step"], 100 * entry[key])
            for entry in log["log"]
            for key in ("eval_mean_token_accuracy", "eval_patch_accuracy")
            if key in entry
        ]
        panel.plot(*zip(*train, strict=True), color=f"C{i}", label=f"{log['name']}: training loss")
        label = f"{log['name']}: validation accuracy"
        accuracy.plot(*zip(*valid, strict=True), color=f"C{i}", linestyle="--", marker=".", label=label)
        start += log["steps"]
    panel.set(xlabel="step", ylabel="loss (lines)", yscale="log")
    accuracy.set(ylabel="accuracy, % (dashed)", ylim=(0, 101))
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def publish(work_dir: Path, recipe: Recipe, output_dir: Path) -> None:
    """
    Writes the checkpoint that [`train`] left in `work_dir` in bfloat16, with its results on validation and test.

    Everything is written aside first, so an interrupted call leaves an older checkpoint as it was.
    """
    finals = [final_dir(work_dir, name) for name in (VISION, *(phase.name for phase in recipe.phases))]
    logs: list[PhaseLog] = [json.loads((final / "log.json").read_text()) for final in finals]
    part = output_dir.with_name(f".{output_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write_weights(finals[-1], part)
    summary = {
        # Of what it started from, the name: a path is one of this machine
        "recipe": {**asdict(recipe), "start": recipe.start and Path(recipe.start).name},
        "train_seconds": round(sum(log["seconds"] for log in logs)),
        **measure(part, recipe),
    }
    (part / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot_training(logs, part / "training.png")
    write_card(part, os.path.relpath(output_dir), **model_card(summary, recipe, output_dir.name))
    replace_folder(part, output_dir)


def write_weights(trained: Path, folder: Path) -> None:
    """The model in bfloat16 and its processor, without code: this package is the code."""
    processor = VoCoLlamaProcessor.from_pretrained(trained)
    VoCoLlamaForConditionalGeneration.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    (folder / "model.safetensors").chmod(0o644)


def measure(folder: Path, recipe: Recipe) -> dict[str, object]:
    """Results of a checkpoint on images and, if it was trained on some, on videos; draws them into its folder."""
    model = load_trained(folder)  # what is measured is what is shipped
    processor = VoCoLlamaProcessor.from_pretrained(folder)
    measured: dict[str, object] = {"num_parameters": model.num_parameters()}
    counts, canvas = recipe.token_counts, recipe.canvas
    for split, number in (("validation", recipe.num_validation_scenes), ("test", recipe.num_test_scenes)):
        scenes = evaluate_scenes(
            model,
            processor,
            split,
            counts,
            shuffled=split == "test",
            limit=number,
            seed=recipe.seed,
            canvas=canvas,
        )
        scenes.print()
        measured[split] = asdict(scenes)
    scenes.plot(folder / "results.png")
    if recipe.phases[-1].videos:
        videos = evaluate_videos(
            model, processor, "test", counts, limit=recipe.num_test_clips, seed=recipe.seed, canvas=canvas
        )
        videos.print()
        videos.plot(folder / "videos.png")
        measured["videos"] = asdict(videos)
    return measured


def replace_folder(part: Path, folder: Path) -> None:
    """Puts a finished folder in the place of an older one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        part.rename(folder)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    part.rename(folder)
    shutil.rmtree(old)
