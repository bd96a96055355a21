"""What a phase trains on: scenes and videos, drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import NotRequired, TypedDict

from datasets import Dataset
from PIL import Image

from .moving import DESCRIBE_VIDEO, ClipRow, make_clip
from .recipe import Phase, Recipe
from .still import DESCRIBE, Message, ObjectRow, Scene, make_scene


VALIDATION_ROWS = 128  # that a training is measured on as it goes


class VisionRow(TypedDict):
    """What the vision tower is trained on."""

    image: Image.Image
    objects: list[ObjectRow]


class PhaseRow(TypedDict):
    """A conversation about an image, or about images, those of a video in time order."""

    messages: list[Message]
    image: NotRequired[Image.Image]
    images: NotRequired[list[Image.Image]]


# Makes columns of the numbers of rows
Draw = Callable[[dict[str, list[int]]], dict[str, list]]


def vision_rows(recipe: Recipe, split: str) -> Dataset:
    """Rows of [`VisionRow`]."""

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        scenes = [draw_scene(recipe, split, index, questions=1) for index in rows["index"]]
        return {"image": [scene["image"] for scene in scenes], "objects": [scene["objects"] for scene in scenes]}

    return drawn_rows(recipe, split, draw)


def phase_rows(recipe: Recipe, phase: Phase, split: str) -> Dataset:
    """Rows of [`PhaseRow`]; in a phase with videos every other row is one."""

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        drawn = [draw_row(recipe, phase, split, index) for index in rows["index"]]
        messages = [row["messages"] for row in drawn]
        if phase.videos:
            return {"images": [row["images"] for row in drawn], "messages": messages}
        return {"image": [row["image"] for row in drawn], "messages": messages}

    return drawn_rows(recipe, split, draw)


def drawn_rows(recipe: Recipe, split: str, draw: Draw) -> Dataset:
    """A data set that keeps nothing but the numbers of its rows."""
    number = recipe.num_train_scenes if split == "train" else min(VALIDATION_ROWS, recipe.num_validation_scenes)
    return Dataset.from_dict({"index": range(number)}).with_transform(kept(draw) if recipe.keep_rows else draw)


def kept(draw: Draw) -> Draw:
    """Draws every row once."""
    rows: dict[int, dict[str, list]] = {}

    def draw_new(batch: dict[str, list[int]]) -> dict[str, list]:
        for index in batch["index"]:
            if index not in rows:
                rows[index] = draw({"index": [index]})
        columns = rows[batch["index"][0]]
        return {name: [rows[index][name][0] for index in batch["index"]] for name in columns}

    return draw_new


def draw_scene(recipe: Recipe, split: str, index: int, questions: int) -> Scene:
    """One scene, as it is drawn for `recipe`."""
    return make_scene(split, index, recipe.seed, recipe.dense_share, questions, recipe.canvas)


def draw_row(recipe: Recipe, phase: Phase, split: str, index: int) -> PhaseRow:
    """One row of [`phase_rows`]; it depends on the arguments alone."""
    if phase.videos and index % 2:
        clip = make_clip(split, index // 2, recipe.seed, recipe.canvas, phase.blinking)
        return {"images": clip["images"], "messages": told(clip, phase, DESCRIBE_VIDEO)}
    scene = draw_scene(recipe, split, index, phase.questions)
    messages = told(scene, phase, DESCRIBE)
    if phase.videos:
        return {"images": [scene["image"]], "messages": messages}
    return {"image": scene["image"], "messages": messages}


def told(row: Scene | ClipRow, phase: Phase, request: str) -> list[Message]:
    """
    What is asked and answered about an image or a video, perhaps with a description behind: there it gives nothing
    away.
    """
    messages = row["messages"][: 2 * phase.questions]
    if phase.describe:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": row["description"]}]
    return messages
