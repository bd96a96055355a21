import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.still import make_scene
from voco_llama_hf.scenes.vision import ATTRIBUTES, patch_accuracy, patch_labels


@given(st.integers(0, 10**6), st.sampled_from([4, 8, 16]), st.sampled_from([SMALL, LARGE]))
@settings(max_examples=40, deadline=None)
def test_every_patch_says_whose_middle_it_shows(index, patch_size, canvas):
    objects = make_scene("train", index, dense_share=0.5, canvas=canvas)["objects"]
    labels = patch_labels(objects, patch_size, canvas.side)
    side = canvas.side // patch_size
    assert labels.shape == (side * side, len(ATTRIBUTES))
    for place, classes in enumerate(labels):
        y, x = (patch_size * index + patch_size // 2 for index in divmod(place, side))
        here = [o for o in objects if 0 <= y - o["top"] < o["pixels"] and 0 <= x - o["left"] < o["pixels"]]
        for (name, values), found in zip(ATTRIBUTES.items(), classes):
            assert found == (values.index(here[0][name]) if here else len(values))


def test_accuracy_counts_patches_on_objects_alone():
    background = [len(values) for values in ATTRIBUTES.values()]
    labels = np.array([[background, [1, 2, 0], [3, 4, 1], [0, 0, 0]]])
    classes = np.array([[[0, 0, 0], [1, 2, 0], [3, 4, 0], [0, 0, 0]]])
    assert patch_accuracy((classes, labels)) == {"patch_accuracy": 2 / 3}
