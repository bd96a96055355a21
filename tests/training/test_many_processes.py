"""Training in processes of its own: killed and resumed, and on two processes over gloo."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
OPTIONS = {"max_steps": 4, "num_voco_tokens": [1, 2, 0], "distillation_weight": 0.5, "max_grad_norm": 0.5}
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(script, output_dir, batch_size, *extra, launcher=(), exit_code=0, **options):
    """Losses by name, which the script leaves in `output_dir`."""
    options = {**OPTIONS, "per_device_train_batch_size": batch_size, **options}
    args = [*launcher, str(HERE / script), str(output_dir), json.dumps(options), *map(json.dumps, extra)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
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


def test_sharded_weights_have_the_losses_of_whole_ones(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = run("fsdp_run.py", tmp_path / "whole", 4)
    check_same(run("fsdp_run.py", tmp_path, 2, launcher=TWO_PROCESSES), whole)


def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, single):
    saves = {"save_strategy": "steps", "save_steps": 1}
    run("sft_run.py", tmp_path, 4, {"kill_at": 3}, exit_code=-signal.SIGKILL, **saves)
    assert not (tmp_path / "losses.json").exists()
    assert (tmp_path / "checkpoint-2").is_dir() and not (tmp_path / "checkpoint-3").exists()
    check_same(run("sft_run.py", tmp_path, 4, {"resume": True}, **saves), single)
