"""Trainings that are killed with `kill -9` at random moments and resumed, each in a process of its own.

Processes are forked from one that has imported everything: a hundred kills take minutes.
"""

import multiprocessing
import random
import time
from pathlib import Path

from datasets import disable_progress_bars
from safetensors.torch import load_file
from training.sft_helpers import conversations, make_trainer

from voco_llama_hf.training.checkpoints import last_checkpoint


OPTIONS = {"num_voco_tokens": [1, 2, 0], "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}


def train(output_dir, max_steps, is_ready):
    disable_progress_bars()
    trainer = make_trainer(output_dir, dataset=conversations(16), max_steps=max_steps, **OPTIONS)
    checkpoint = last_checkpoint(output_dir)
    is_ready.set()
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.end()


def kill_at_random(folder, max_steps, num_kills, longest_wait, seed=0):
    """
    Trains in one folder after another until `num_kills` trainings were killed, and then to the end.

    Returns:
        Counts: kills, those that left a torn checkpoint, trainings that came to their end.

    Raises:
        AssertionError: if a training failed by itself, or ended with other weights than an undisturbed one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.killed_run"])
    rng = random.Random(seed)

    def start(output_dir):
        is_ready = context.Event()
        process = context.Process(target=train, args=(str(output_dir), max_steps, is_ready))
        process.start()
        while not is_ready.wait(1) and process.is_alive():
            pass
        return process

    undisturbed = start(folder / "undisturbed")
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected = load_file(folder / "undisturbed" / "model.safetensors")
    counts = {"kills": 0, "torn": 0, "finished": 0}
    while True:
        output_dir = folder / str(counts["finished"])
        process = start(output_dir)
        if counts["kills"] < num_kills:
            process.join(rng.uniform(0, longest_wait))
            if process.is_alive():
                process.kill()
                process.join()
                counts["kills"] += 1
                newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name[11:]), default=None)
                counts["torn"] += newest is not None and str(newest) != last_checkpoint(output_dir)
                continue
        process.join()
        assert process.exitcode == 0, f"after {counts}"
        weights = load_file(output_dir / "model.safetensors")
        assert weights.keys() == expected.keys()
        assert all(weights[name].equal(expected[name]) for name in expected), f"other weights after {counts}"
        counts["finished"] += 1
        if counts["kills"] == num_kills:
            return counts


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        start_time = time.monotonic()
        print(kill_at_random(Path(folder), max_steps=40, num_kills=int(sys.argv[1]), longest_wait=float(sys.argv[2])))
        print(f"{time.monotonic() - start_time:.0f} s")
