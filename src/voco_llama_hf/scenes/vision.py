"""Pretraining of the vision tower on the scenes: every patch says what lies on it. LLaVA's is pretrained, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import BaseImageProcessor, CLIPVisionModel, EvalPrediction, Trainer, TrainingArguments
from transformers.modeling_outputs import TokenClassifierOutput

from .data import VisionRow, vision_rows
from .muon import MuonMixin
from .objects import COLOURS, SHAPES, SIZES
from .recipe import Recipe
from .running import phase_options, run_phase
from .still import ObjectRow


# What a patch can show; the index after the last one is the background
ATTRIBUTES = {"colour": tuple(COLOURS), "name": (*SHAPES, *map(str, range(10))), "size": SIZES}


class PatchClassifier(torch.nn.Module):
    """
    A vision tower with a linear head on every patch.

    Args:
        vision_tower ([`~transformers.CLIPVisionModel`]): The tower, which is trained in place.
    """

    def __init__(self, vision_tower: CLIPVisionModel):
        super().__init__()
        self.vision_tower = vision_tower
        self.sizes = [len(values) + 1 for values in ATTRIBUTES.values()]
        self.head = torch.nn.Linear(vision_tower.config.hidden_size, sum(self.sizes))

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> TokenClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Preprocessed images.
            labels (`torch.LongTensor` of shape `(batch_size, patches, 3)`): See [`patch_labels`].

        Returns:
            [`~transformers.modeling_outputs.TokenClassifierOutput`]: `logits` is `(batch_size, patches, 3)`, the class
            that is most likely.
        """
        patches = self.vision_tower(pixel_values).last_hidden_state[:, 1:]
        parts = self.head(patches).float().split(self.sizes, dim=-1)
        losses = [cross_entropy(part.flatten(0, 1), labels[..., i].flatten()) for i, part in enumerate(parts)]
        return TokenClassifierOutput(
            loss=torch.stack(losses).sum(), logits=torch.stack([part.argmax(-1) for part in parts], dim=-1)
        )


def patch_labels(objects: list[ObjectRow], patch_size: int, side: int) -> np.ndarray:
    """Classes of the attributes at the middle of every patch of a canvas, rows first: `(patches, 3)`."""
    middles = np.arange(side // patch_size) * patch_size + patch_size // 2
    labels = np.empty((len(middles), len(middles), len(ATTRIBUTES)), dtype=np.int64)
    labels[:] = [len(values) for values in ATTRIBUTES.values()]
    for o in objects:
        rows, columns = ((middles >= edge) & (middles < edge + o["pixels"]) for edge in (o["top"], o["left"]))
        shown = (o["colour"], o["name"], o["size"])
        labels[np.ix_(rows, columns)] = [
            values.index(value) for values, value in zip(ATTRIBUTES.values(), shown, strict=True)
        ]
    return labels.reshape(-1, len(ATTRIBUTES))


class PatchCollator:
    """
    Makes batches for [`PatchClassifier`] out of rows of the scenes.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]): Image processor of the tower.
        patch_size (`int`): Side of a patch in pixels.
    """

    def __init__(self, image_processor: BaseImageProcessor, patch_size: int):
        self.image_processor = image_processor
        self.patch_size = patch_size

    def __call__(self, scenes: list[VisionRow]) -> dict[str, torch.Tensor]:
        pixels = self.image_processor(images=[scene["image"] for scene in scenes], return_tensors="pt").pixel_values
        labels = np.stack([patch_labels(scene["objects"], self.patch_size, scene["image"].width) for scene in scenes])
        return {"pixel_values": pixels, "labels": torch.from_numpy(labels)}


def patch_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the patches on objects all of whose attributes are recognised."""
    classes, labels = prediction
    on_object = labels[..., 0] != len(ATTRIBUTES["colour"])
    return {"patch_accuracy": float((classes == labels)[on_object].all(-1).mean())}


class MuonTrainer(MuonMixin, Trainer):
    """[`~transformers.Trainer`] with [`MuonWithAdamW`]."""


def train_vision_tower(
    vision_tower: CLIPVisionModel, image_processor: BaseImageProcessor, recipe: Recipe, output_dir: Path
) -> list[dict[str, float]]:
    """
    Trains a vision tower in place, from the last checkpoint in `output_dir` where there is one.

    Args:
        vision_tower ([`~transformers.CLIPVisionModel`]): The tower.
        image_processor ([`~transformers.BaseImageProcessor`]): Its image processor.
        recipe ([`Recipe`]): What to train it on, and for how long.
        output_dir (`Path`): Folder of the trainer's checkpoints.

    Returns:
        `list[dict]`: the trainer's log.
    """
    args = TrainingArguments(
        **phase_options(recipe, output_dir, recipe.vision_steps, recipe.vision_batch_size),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
    )
    trainer = MuonTrainer(
        PatchClassifier(vision_tower),
        args,
        train_dataset=vision_rows(recipe, "train"),
        eval_dataset=vision_rows(recipe, "validation"),
        data_collator=PatchCollator(image_processor, vision_tower.config.patch_size),
        compute_metrics=patch_accuracy,
    )
    return run_phase(trainer)
