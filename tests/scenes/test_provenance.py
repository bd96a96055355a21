from dataclasses import replace

import pytest
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.phases import common, train
from voco_llama_hf.scenes.provenance import MADE_OF, claim, is_made, made_of
from voco_llama_hf.scenes.retention.sizes import MINI_SIZE, SMALL_SIZE
from voco_llama_hf.scenes.retention.study import Study, elastic_arm


def write_weights(folder, content: bytes):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def test_what_decides_a_training_is_told_apart(tmp_path):
    start = write_weights(tmp_path / "start", b"some")
    recipe, phase = common(RECIPE), RECIPE.phases[1]
    made = made_of(start, recipe, phase)
    claim(tmp_path / "phase", made)
    assert is_made(tmp_path / "phase", made_of(start, recipe, phase))
    claim(tmp_path / "phase", made)  # goes on
    others = {
        "Phase.num_voco_tokens": made_of(start, recipe, replace(phase, num_voco_tokens=(1, 4))),
        "Phase.videos": made_of(start, recipe, replace(phase, videos=True)),
        "Recipe.canvas": made_of(start, replace(recipe, canvas=MINI_SIZE.base.canvas), phase),
        "start": made_of(write_weights(tmp_path / "other", b"other"), recipe, phase),
    }
    for name, other in others.items():
        for look in (claim, is_made):
            with pytest.raises(ValueError, match=f"differs in {name}: choose another folder"):
                look(tmp_path / "phase", other)
    assert is_made(tmp_path / "phase", made)


def test_a_field_that_is_as_by_default_is_not_told():
    """So that what was trained before there was such a field is found."""
    assert "Phase.blinking" not in made_of(None, RECIPE.phases[1])
    assert made_of(None, replace(RECIPE.phases[1], blinking=0.5))["Phase.blinking"] == 0.5


@pytest.mark.parametrize("found", [{}, {"log.json": "{}"}], ids=["empty", "of no training"])
def test_a_folder_that_says_nothing(tmp_path, found):
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    if found:
        with pytest.raises(ValueError, match=r"differs in Phase\.\w+"):
            is_made(tmp_path, made_of(None, RECIPE.phases[0]))
    else:
        assert not is_made(tmp_path, made_of(None, RECIPE.phases[0]))


def test_a_study_does_not_go_on_from_another_start(tmp_path):
    final = tmp_path / "vision-final"
    claim(final, made_of(None, common(MINI_SIZE.base)))
    for start in (lambda: train(SMALL_SIZE.base, tmp_path), Study(tmp_path, SMALL_SIZE).prepare):
        with pytest.raises(ValueError, match=r"differs in Recipe\.text_layers"):
            start()
    assert [path.name for path in tmp_path.rglob("*")] == ["vision-final", MADE_OF]


def test_arms_of_other_numbers_have_other_folders():
    assert len({elastic_arm(ks).folder for ks in ((1, 2), (1, 2, 8), (12,))}) == 3
