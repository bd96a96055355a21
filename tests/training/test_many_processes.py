"""Training in processes of its own: killed and resumed, and on two processes over gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training.killed_run import kill_at_random


HERE = Path(__file__).parent
OPTIONS = {"max_steps": 4, "num_voco_tokens": [1, 2, 0], "distillation_weight": 0.5, "max_grad_norm": 0.5}
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(script, output_dir, batch_size, *extra, launcher=(), exit_code=0, **options):
    """Losses by name, which the script leaves in `output_dir`."""
    options = {**OPTIONS, "per_device_train_batch_size": batch_size, **options}
    args = [*launcher, str(HERE / script), str(output_dir), json.dumps(options), *map(json.dumps, extra)]
    return launch(args, output_dir, exit_code)


def launch(args, output_dir, exit_code=0):
    environment = {"ACCELERATE_USE_CPU": "true", **os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environment)
    assert done.returncode == exit_code, done.stderr[-3000:]
    return json.loads((output_dir / "losses.json").read_text()) if exit_code == 0 else None


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for part, curve in expected.items():
        assert found[part] == pytest.approx(curve, abs=1e-4), part


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run("sft_run.py", tmp_path_factory.mktemp("single"), 4)


def test_two_processes_have_the_losses_of_one(tmp_path, single):
    check_same(run("sft_run.py", tmp_path, 2, launcher=TWO_PROCESSES), single)


@pytest.mark.slow
def test_zero3_has_the_losses_of_one_process(tmp_path, single, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # which goes before DeepSpeed
    zero3 = ("--use_deepspeed", "--zero_stage=3", "--num_processes=2", "--mixed_precision=no")
    check_same(run("sft_run.py", tmp_path, 2, launcher=("-m", "accelerate.commands.launch", *zero3)), single)


# Images of the rows that the two processes get in turn
PATTERNS = {"one has an image": (1, 0), "the other has": (0, 1), "none": (0,), "mixed": (2, 0, 0, 1, 0, 0, 1, 1)}
KINDS = {
    "single pass": {"num_voco_tokens": [1, 2, 0]},
    "two stages": {"two_stages": True, "num_voco_tokens": [2]},
    "several draws": {"two_stages": True, "num_voco_tokens": [2, 1, 4], "draws_per_step": 2},
    "distilled": {"num_voco_tokens": [2, 1], "distillation_weight": 0.5},
    "everything trained": {"num_voco_tokens": [2], "freeze": [], "gradient_checkpointing": True},
}


def test_two_processes_resume_in_a_later_epoch_with_the_rows_that_are_left(tmp_path):
    # 4 steps an epoch
    saves = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "launcher": TWO_PROCESSES}
    whole = run("sft_run.py", tmp_path / "whole", 2, **saves)
    (tmp_path / "whole" / "checkpoint-6").rename(tmp_path / "checkpoint-6")
    rest = run("sft_run.py", tmp_path, 2, {"resume": True}, **saves)
    check_same(rest, whole)


def sharded_cases(batch_size):
    shared = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": batch_size, "evaluates": True}
    return {
        f"{pattern}, {kind}": {**shared, **options, "images_per_row": images, "per_device_eval_batch_size": batch_size}
        for pattern, images in PATTERNS.items()
        for kind, options in KINDS.items()
    }


def run_cases(output_dir, batch_size, launcher=()):
    output_dir.mkdir()
    args = [*launcher, str(HERE / "fsdp_run.py"), str(output_dir), json.dumps(sharded_cases(batch_size))]
    return launch(args, output_dir)


def test_sharded_weights_have_the_losses_of_whole_ones_whichever_rows_have_images(tmp_path):
    whole = run_cases(tmp_path / "whole", 2)
    check_same(run_cases(tmp_path / "sharded", 1, TWO_PROCESSES), whole)


def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, single):
    saves = {"save_strategy": "steps", "save_steps": 1}
    run("sft_run.py", tmp_path, 4, {"kill_at": 3}, exit_code=-signal.SIGKILL, **saves)
    assert not (tmp_path / "losses.json").exists()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-3").exists()
    check_same(run("sft_run.py", tmp_path, 4, {"resume": True}, **saves), single)


@pytest.mark.parametrize("num_kills", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_a_training_killed_at_any_moment_resumes_to_the_same_weights(tmp_path, num_kills):
    counts = kill_at_random(tmp_path, max_steps=8 if num_kills == 3 else 40, num_kills=num_kills, longest_wait=3)
    assert counts["kills"] == num_kills and counts["finished"] >= 1
