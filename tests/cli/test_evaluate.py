import json
import sys
from dataclasses import replace

import pytest
from PIL import Image

from voco_llama_cli.evaluate import StudySize, chosen_size
from voco_llama_cli.options import join_numbers


@pytest.fixture
def evaluate(invoke, checkpoint):
    return lambda *args, **kwargs: invoke("evaluate", "--model", checkpoint, *args, **kwargs)


def test_evaluate(evaluate, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    output, plot = tmp_path / "results.json", tmp_path / "results.png"
    result = evaluate("--limit", 3, "-k", "1", "2", "--batch-size", 8, "--output", output, "--plot", plot)
    assert "k=1" in result.stdout and "k=2" in result.stdout and "k=4" not in result.stdout
    assert result.stderr == ""
    assert "comparison" in result.stdout and "…" not in result.stdout
    results = json.loads(output.read_text())
    assert (results["split"], results["num_scenes"]) == ("test", 3)
    assert set(results["accuracy"]) == {"k=1", "k=2", "uncompressed"}
    assert Image.open(plot).width > 500


def test_evaluate_videos(evaluate, tmp_path):
    output, plot = tmp_path / "results.json", tmp_path / "results.png"
    result = evaluate("--suite", "videos", "--limit", 2, "-k", 1, "--output", output, "--plot", plot)
    assert all(
        word in result.stdout for word in ("k=1", "all frames", "one frame", "out of order", "chance", "blinks")
    )
    assert set(json.loads(output.read_text())["accuracy"]["k=1"]) == {"all frames", "one frame", "out of order"}
    assert Image.open(plot).width > 500


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-k", "0"], "takes numbers from 1 on"),
        (["-k", ""], "takes numbers from 1 on"),
        (["-k", "some"], "takes numbers like 1,2,4"),
        (["-k", "1", "10000"], "at most 576, got 10000"),
        (["--limit", "0"], "Invalid value for '--limit'"),
        (["--suite", "retention"], "--model goes with --suite scenes, videos and lmms, not with retention"),
        (
            ["--suite", "video-retention"],
            "--model goes with --suite scenes, videos and lmms, not with video-retention",
        ),
        (["--steps", "5"], "--steps goes with --suite retention, video-retention and distillation, not with scenes"),
        (["--suite", "videos", "--learning-rate", "1e-3"], "--learning-rate goes with --suite retention"),
        (["--seeds", "3"], "--seeds goes with --suite retention, video-retention and distillation"),
        (["--work-dir", "{folder}/runs"], "--work-dir goes with --suite retention"),
        (["--suite", "lmms", "pope", "--split", "test"], "--split goes with --suite scenes, videos, retention"),
        (["--num-frames", "4"], "--num-frames goes with --suite lmms, not with scenes"),
        (["--split", "holdout"], "'holdout' is not one of"),
        (["--output", "{folder}/missing/a.json"], "is not a folder"),
        (["--plot", "{folder}/a.txt"], "can be drawn as .pdf, .png, .svg only"),
        (["scenes"], "unexpected extra argument"),
    ],
)
def test_errors(evaluate, tmp_path, args, message):
    assert message in evaluate(*[arg.format(folder=tmp_path) for arg in args], exit_code=2).stderr


@pytest.mark.parametrize(
    ("suite", "rates", "message"),
    [
        ("retention", ["0"], "--learning-rate must be a finite number above 0, got 0.0"),
        ("distillation", ["1e-3", "nan"], "must be a finite number above 0, got 0.001 nan"),
        ("video-retention", ["1e-3", "inf"], "must be a finite number above 0, got 0.001 inf"),
    ],
)
def test_learning_rates_that_cannot_be_trained_with(invoke, tmp_path, suite, rates, message):
    options = [option for rate in rates for option in ("--learning-rate", rate)]
    refused = invoke("evaluate", "--suite", suite, *options, "--work-dir", tmp_path / "runs", exit_code=2)
    assert message in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_the_size_of_a_study():
    from voco_llama_hf.scenes.retention.sizes import MINI_SIZE

    assert chosen_size(StudySize.mini, None, None) == MINI_SIZE
    other = chosen_size(StudySize.mini, 7, [1e-3, 3e-3])
    assert other == replace(MINI_SIZE, steps=7, learning_rates=(1e-3, 3e-3))


def test_existing_output(evaluate, tmp_path):
    (tmp_path / "results.json").write_text("old")
    assert "--force to replace it" in evaluate("--output", tmp_path / "results.json", exit_code=2).stderr
    assert (tmp_path / "results.json").read_text() == "old"


def test_an_existing_second_picture(invoke, tmp_path):
    (tmp_path / "study_training.png").write_text("old")
    options = ["--suite", "retention", "--plot", tmp_path / "study.png", "--work-dir", tmp_path]
    refused = invoke("evaluate", *options, exit_code=2)
    assert "study_training.png" in refused.stderr and "--force to replace it" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["study_training.png"]


def test_without_the_train_extra(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "pip install 'voco-llama-hf[train]'" in evaluate(exit_code=2).stderr


def test_join_numbers():
    assert join_numbers(["-k", "1", "2", "--limit", "3", "x"], ["-k"]) == ["-k", "1,2", "--limit", "3", "x"]
    assert join_numbers(["1", "2"], ["-k"]) == ["1", "2"]
