"""What a phase trains on: scenes and videos, drawn when they are asked for."""

from __future__ import annotations

from datasets import Dataset

from .moving import DESCRIBE_VIDEO, make_clip
from .recipe import Phase, Recipe
from .still import DESCRIBE, make_scene


VALIDATION_ROWS = 128  # that a training is measured on as it goes


def vision_rows(recipe: Recipe, split: str) -> Dataset:
    """Columns `image` and `objects`, for the training of the vision tower."""

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        scenes = [draw_scene(recipe, split, index, questions=1) for index in rows["index"]]
        return {column: [scene[column] for scene in scenes] for column in ("image", "objects")}

    return drawn_rows(recipe, split, draw)


def phase_rows(recipe: Recipe, phase: Phase, split: str) -> Dataset:
    """Columns `messages` and `image`, or `images` in a phase with videos, every other row of which is one."""

    def draw(rows: dict[str, list[int]]) -> dict[str, list]:
        drawn = [draw_row(recipe, phase, split, index) for index in rows["index"]]
        return {column: [row[column] for row in drawn] for column in drawn[0]}

    return drawn_rows(recipe, split, draw)


def drawn_rows(recipe: Recipe, split: str, draw) -> Dataset:
    number = recipe.num_train_scenes if split == "train" else min(VALIDATION_ROWS, recipe.num_validation_scenes)
    return Dataset.from_dict({"index": range(number)}).with_transform(draw)


def draw_scene(recipe: Recipe, split: str, index: int, questions: int) -> dict:
    return make_scene(split, index, recipe.seed, recipe.dense_share, questions, recipe.canvas)


def draw_row(recipe: Recipe, phase: Phase, split: str, index: int) -> dict:
    """One row of [`phase_rows`]; it depends on the arguments alone."""
    if phase.videos and index % 2:
        clip = make_clip(split, index // 2, recipe.seed, recipe.canvas)
        return {"images": clip["images"], "messages": told(clip, phase, DESCRIBE_VIDEO)}
    scene = draw_scene(recipe, split, index, phase.questions)
    images = {"images": [scene["image"]]} if phase.videos else {"image": scene["image"]}
    return {**images, "messages": told(scene, phase, DESCRIBE)}


def told(row: dict, phase: Phase, request: str) -> list[dict[str, str]]:
    """
    What is asked and answered about an image or a video, perhaps with a description behind: there it gives nothing
    away.
    """
    messages = row["messages"][: 2 * phase.questions]
    if phase.describe:
        messages += [{"role": "user", "content": request}, {"role": "assistant", "content": row["description"]}]
    return messages
