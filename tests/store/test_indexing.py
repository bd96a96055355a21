"""Indexing in processes of its own: killed at random moments, and on two processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.conftest import save_checkpoint
from modeling.helpers import tiny_model
from PIL import Image
from video_files import make_frames, write_video

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.images import open_image
from voco_llama_hf.store import VoCoStore, hash_file
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files
from voco_llama_hf.videos import is_video, read_frames


HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """16 images of which two are the same, two videos, and three files that are neither."""
    folder = tmp_path_factory.mktemp("archive")
    (folder / "deep" / "deeper").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(15):
        picture = Image.fromarray(noise.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        picture.save(folder / ("deep" if i % 2 else "") / f"{i}.png")
    (folder / "deep" / "deeper" / "copy.png").write_bytes((folder / "0.png").read_bytes())
    write_video(folder / "film.mp4", make_frames(10))
    write_video(folder / "deep" / "short.mkv", make_frames(2))
    (folder / "broken.png").write_bytes((folder / "2.png").read_bytes()[:80])
    (folder / "broken.mp4").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("not an image")
    return folder


def check_every_entry(store: VoCoStore, archive: Path, checkpoint: Path) -> None:
    """Every entry against a fresh compression of its file, one by one; nothing lost and nothing doubled."""
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    files = [path for path in find_files(archive) if "broken" not in path]
    entries = list(store)
    assert len(entries) == len({entry.content_hash for entry in entries}) == len(set(map(hash_file, files))) == 17
    assert sorted(source for entry in entries for source in entry.sources) == files
    for entry in entries:
        path = entry.sources[0]
        frames = list(read_frames(path, 3)) if is_video(path) else [open_image(path)]
        fresh = model.compress(processor.image_processor(frames, return_tensors="pt")["pixel_values"], 2)
        stored = store.get(entry.content_hash)
        assert stored.token_counts == fresh.token_counts
        torch.testing.assert_close(stored.keys, fresh.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stored.values, fresh.values, atol=1e-5, rtol=1e-4)
    assert all(problem is None for _, problem in store.verify())
    assert {Path(source).name for source in store.failures()} == {"broken.png", "broken.mp4"}


def make_indexer(path: Path, checkpoint: Path, **options) -> Indexer:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    return Indexer(path, model, processor, 2, Sampling(num_frames=3), **options)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_index(archive, checkpoint, tmp_path, num_workers):
    indexer = make_indexer(tmp_path / "store", checkpoint, batch_size=4, shard_images=6, num_workers=num_workers)
    todo = indexer.select(find_files(archive))
    assert len(todo) == 20
    results = list(indexer.run(todo))
    assert sorted(result.path for result in results) == todo
    assert sum(result.num_images for result in results) == 15 + 3 + 2
    assert {Path(result.path).name for result in results if result.error} == {"broken.png", "broken.mp4"}
    check_every_entry(indexer.store, archive, checkpoint)
    assert len(list(indexer.store.shards.iterdir())) == 3
    # What is there is skipped, files that failed are tried again
    again = make_indexer(tmp_path / "store", checkpoint)
    assert {Path(path).name for path in again.select(find_files(archive))} == {"broken.png", "broken.mp4"}


def test_changed_files_and_other_k_are_new(archive, checkpoint, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes((archive / "0.png").read_bytes())
    indexer = make_indexer(tmp_path / "store", checkpoint)
    list(indexer.run(indexer.select([str(picture)])))
    assert indexer.select([str(picture)]) == []
    indexer.num_voco_tokens = 3
    assert len(list(indexer.run(indexer.select([str(picture)])))) == 1
    picture.write_bytes((archive / "2.png").read_bytes())
    list(indexer.run(indexer.select([str(picture)])))
    assert len(indexer.store) == 3
    assert [entry.content_hash for entry in indexer.store.find("a.png")] == [hash_file(picture)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_random_moments(archive, checkpoint, tmp_path):
    script = [sys.executable, HERE / "indexing_run.py", checkpoint, archive, tmp_path / "store", "8"]
    done = subprocess.run(script, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= 3  # the others were done before
    with VoCoStore(tmp_path / "store") as store:
        check_every_entry(store, archive, checkpoint)
        store.compact()
        check_every_entry(store, archive, checkpoint)
    with VoCoStore(f"{tmp_path / 'store'}.whole") as store:
        check_every_entry(store, archive, checkpoint)


def test_two_processes(archive, checkpoint, tmp_path):
    """Each writes shards of its own; the first one's index has them all."""
    command = [sys.executable, "-m", "voco_llama_cli", "index", archive, "--store", tmp_path / "store"]
    options = ["--model", checkpoint, "-k", "2", "--num-frames", "3", "--num-processes", "2", "--device", "cpu"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    with VoCoStore(tmp_path / "store") as store:
        check_every_entry(store, archive, checkpoint)
        assert len(list(store.shards.iterdir())) == 2
    assert "17 entries, 20 images or frames" in done.stdout and "2 cannot be read" in done.stdout


def test_another_model_is_refused_before_anything_is_read(archive, checkpoint, tmp_path):
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    with VoCoStore(tmp_path / "store", tiny_model(1, voco_token_id=processor.image_token_id).fingerprint()):
        pass
    with pytest.raises(ValueError, match="was made by another model than this one: weights is"):
        make_indexer(tmp_path / "store", checkpoint)
