"""The scene that README and demo ask about is one of the test split."""

import json
from pathlib import Path

import numpy as np

from voco_llama_hf.images import open_image
from voco_llama_hf.scenes.objects import SceneObject
from voco_llama_hf.scenes.still import QUESTIONS, make_scene


EXAMPLES = Path(__file__).parents[2] / "examples"


def test_example_scene():
    example = json.loads((EXAMPLES / "scene.json").read_text())
    assert example["split"] == "test"
    scene = make_scene(example["split"], example["index"])
    np.testing.assert_array_equal(open_image(EXAMPLES / "scene.png"), scene["image"])
    objects = [SceneObject(**row) for row in scene["objects"]]
    answers = dict(pair for family in QUESTIONS.values() for pair in family(objects))
    for row in example["questions"]:
        assert answers[row["question"]] == row["answer"]
