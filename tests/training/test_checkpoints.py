import logging
import shutil

import pytest
from training.sft_helpers import losses, make_trainer

from voco_llama_hf.training.checkpoints import check_checkpoint, last_checkpoint


OPTIONS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "num_voco_tokens": [2]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, **OPTIONS)
    trainer.train()
    return folder, losses(trainer)


@pytest.fixture
def folder(tmp_path, trained):
    return shutil.copytree(trained[0], tmp_path / "copy")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda folder: (folder / "trainer_state.json").write_text(""), "trainer_state.json breaks off"),
        (lambda folder: cut(folder / "trainer_state.json"), "trainer_state.json breaks off"),
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors breaks off"),
        (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt breaks off"),
        (lambda folder: (folder / "rng_state.pth").write_bytes(b""), "rng_state.pth breaks off"),
    ],
)
def test_what_is_not_whole_is_skipped_and_said(folder, caplog, damage, message):
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    damage(folder / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"checkpoint-3 is skipped, it is not whole: {message}" in caplog.text
    with pytest.raises(ValueError, match=f"checkpoint-3 is not whole: {message}"):
        check_checkpoint(folder / "checkpoint-3")


def test_folders_of_other_names_are_no_checkpoints(folder, tmp_path):
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-4-merged")
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-10")
    assert last_checkpoint(folder) == str(folder / "checkpoint-10")
    shutil.rmtree(folder / "checkpoint-10")
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    assert last_checkpoint(tmp_path / "none") is None


def test_a_trainer_resumes_from_the_last_whole_one(folder, trained):
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    trainer = make_trainer(folder, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and losses(trainer) == pytest.approx(trained[1], abs=1e-6)
    with pytest.raises(ValueError, match="there is no checkpoint"):
        make_trainer(folder, **OPTIONS).train(resume_from_checkpoint=str(folder / "checkpoint-9"))


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        make_trainer(tmp_path, **OPTIONS).train(resume_from_checkpoint=True)
