"""The scene that README and demo ask about is one of the test split."""

import json
from pathlib import Path

import numpy as np
import pytest

from voco_llama_hf.images import open_image
from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.objects import SceneObject
from voco_llama_hf.scenes.still import QUESTIONS, make_scene


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "picture, answers, canvas, dense_share",
    [
        ("examples/scene.png", "examples/scene.json", SMALL, 0.5),
        ("docs/source/images/twelve_objects.png", "tests/fixtures/twelve_objects.json", LARGE, 1.0),
    ],
)
def test_example_scene(picture, answers, canvas, dense_share):
    example = json.loads((ROOT / answers).read_text())
    assert example["split"] == "test"
    scene = make_scene(example["split"], example["index"], dense_share=dense_share, canvas=canvas)
    np.testing.assert_array_equal(open_image(ROOT / picture), scene["image"])
    objects = [SceneObject(**row, canvas=canvas) for row in scene["objects"]]
    answers = dict(pair for family in QUESTIONS.values() for pair in family(objects))
    for row in example["questions"]:
        assert answers[row["question"]] == row["answer"]
