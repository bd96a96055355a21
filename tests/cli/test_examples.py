"""The scene that README and demo ask about is one of the test split."""

import json
from pathlib import Path

import numpy as np
import pytest

from voco_llama_hf.images import open_image
from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.objects import SceneObject
from voco_llama_hf.scenes.still import QUESTIONS, make_scene


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name, canvas, dense_share", [("scene", SMALL, 0.5), ("twelve_objects", LARGE, 1.0)])
def test_example_scene(name, canvas, dense_share):
    example = json.loads((EXAMPLES / f"{name}.json").read_text())
    assert example["split"] == "test"
    scene = make_scene(example["split"], example["index"], dense_share=dense_share, canvas=canvas)
    np.testing.assert_array_equal(open_image(EXAMPLES / f"{name}.png"), scene["image"])
    objects = [SceneObject(**row, canvas=canvas) for row in scene["objects"]]
    answers = dict(pair for family in QUESTIONS.values() for pair in family(objects))
    for row in example["questions"]:
        assert answers[row["question"]] == row["answer"]
