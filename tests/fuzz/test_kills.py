"""Killed at each write: nothing is lost, and nothing is left behind after the next run."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz.killing import STRACE, kill_at_calls, kill_at_events
from fuzz.small_store import (
    FINGERPRINT,
    NEW,
    REMOVED,
    check_content,
    check_whole,
    make_cache,
    make_content,
    make_store,
    originals,
    same,
)
from modeling.helpers import build_processor, tiny_model
from PIL import Image

from voco_llama_hf import VoCoCache
from voco_llama_hf.files import new_folder, written_aside
from voco_llama_hf.store import VoCoStore
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
Kills = Callable[[Callable[[], None], Path], Iterator[bool]]


@dataclass
class Change:
    """Something that is done to a store, and the entries that it has afterwards; `kept` are there all the time."""

    run: Callable[[VoCoStore], object]
    seeds: set[int]
    kept: set[int]


CHANGES = {
    "add": Change(lambda store: store.add([make_content(NEW)], [originals()[NEW]]), {*range(6), NEW}, set(range(6))),
    "replace": Change(
        lambda store: store.add([make_content(2)], [originals()[2]], replace=True), set(range(6)), set(range(6))
    ),
    "remove": Change(lambda store: store.remove(make_content(4).content_hash), {0, 1, 2, 3, 5}, {0, 1, 2, 3, 5}),
    "compact": Change(lambda store: store.compact(), set(range(6)), set(range(6))),
    "record": Change(lambda store: store.record_failures({"a.png": "is none"}), set(range(6)), set(range(6))),
}


def kill_a_change(name: str, folder: Path, kills: Kills) -> int:
    change, path, number = CHANGES[name], folder / "store", 0
    whole = make_store(folder / "whole")

    def start_again() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, path)

    def run() -> None:
        with VoCoStore(path, FINGERPRINT) as store:
            change.run(store)

    start_again()
    for killed in kills(run, folder):
        number += killed
        with VoCoStore(path) as store:
            found = {int(entry.content_hash, 16) for entry in store}
            assert change.kept <= found and REMOVED not in found
            assert check_content(store) >= len(found)
            held = sum(file.stat().st_size for file in (path / "shards").rglob("*") if file.is_file())
            assert store.nbytes == held
        run()
        check_whole(path, change.seeds)
        start_again()
    return number


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_store(name, quick_folder):
    assert kill_a_change(name, quick_folder, lambda run, folder: kill_at_events(run, folder, step=7)) > 2


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_store_at_each_call(name, quick_folder):
    number = kill_a_change(name, quick_folder, lambda run, folder: kill_at_calls(run))
    assert number > 10
    print(f"{name}: killed at {number} calls")


def kill_a_creation(folder: Path, kills: Kills) -> int:
    path, number = folder / "store", 0

    def run() -> None:
        with VoCoStore(path, FINGERPRINT) as store:
            store.add([make_content(0)], [originals()[0]])

    for killed in kills(run, folder):
        number += killed
        run()
        check_whole(path, {0})
        shutil.rmtree(path)
    return number


def test_a_new_store(quick_folder):
    assert kill_a_creation(quick_folder, lambda run, folder: kill_at_events(run, folder, step=5)) > 2


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_a_new_store_at_each_call(quick_folder):
    print(f"new: killed at {kill_a_creation(quick_folder, lambda run, folder: kill_at_calls(run))} calls")


def kill_an_index(folder: Path, kills: Kills) -> int:
    """Six images and one that is none, in three shards."""
    processor = build_processor()
    model = tiny_model(voco_token_id=processor.image_token_id).eval()
    (folder / "photos").mkdir()
    for seed in range(6):
        Image.new("RGB", (32, 32), (40 * seed, 9, 9)).save(folder / "photos" / f"{seed}.png")
    (folder / "photos" / "broken.png").write_text("none")
    path, number = folder / "store", 0

    def run() -> None:
        indexer = Indexer(path, model, processor, 2, Sampling(num_frames=2), batch_size=2, shard_images=2)
        list(indexer.run(indexer.select(find_files(folder / "photos"))))
        indexer.store.close()

    for killed in kills(run, folder / "store"):
        number += killed
        run()
        with VoCoStore(path, model.fingerprint()) as store:
            assert len(store) == 6 and all(problem is None for _, problem in store.verify())
            assert sorted(source for entry in store for source in entry.sources) == find_files(folder / "photos")[:6]
            assert [Path(source).name for source in store.failures()] == ["broken.png"]
            known = store._index.shard_names()
        assert {file.name for file in (path / "shards").iterdir()} == known
        assert {file.name for file in path.iterdir()} == {"index.sqlite", "shards"}
        shutil.rmtree(path)
    return number


def test_index(quick_folder):
    assert kill_an_index(quick_folder, lambda run, folder: kill_at_events(run, folder, step=29)) > 2


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_index_at_each_call(quick_folder):
    number = kill_an_index(quick_folder, lambda run, folder: kill_at_calls(run, step=9))
    print(f"index: killed at {number} calls")


def kill_a_save(folder: Path, kills: Kills) -> int:
    path, number = folder / "cache.safetensors", 0
    old, new = make_cache(1), make_cache(2)
    for killed in kills(lambda: new.save(path), folder):
        number += killed
        if path.exists():
            assert same(VoCoCache.load(path), old) or same(VoCoCache.load(path), new)
        new.save(path)
        assert same(VoCoCache.load(path), new) and os.listdir(folder) == ["cache.safetensors"]
        old.save(path)
    return number


def test_save(quick_folder):
    assert kill_a_save(quick_folder, kill_at_events) > 3


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_save_at_each_call(quick_folder):
    print(f"save: killed at {kill_a_save(quick_folder, lambda run, folder: kill_at_calls(run))} calls")


def kill_a_folder(folder: Path, kills: Kills) -> int:
    """What `convert` and `export` write: a folder of several files."""
    target, number = folder / "model", 0
    model = tiny_model()

    def run() -> None:
        with new_folder(target) as aside:
            (aside / "notes.txt").write_text("first")
            model.save_pretrained(aside)

    for killed in kills(run, folder):
        number += killed
        if not target.exists():
            run()
        assert os.listdir(folder) == ["model"]
        assert {"notes.txt", "config.json", "model.safetensors"} <= set(os.listdir(target))
        shutil.rmtree(target)
    return number


def test_a_folder(quick_folder):
    assert kill_a_folder(quick_folder, lambda run, folder: kill_at_events(run, folder, step=5)) > 2


@pytest.mark.slow
@pytest.mark.skipif(STRACE is None, reason="needs strace")
def test_a_folder_at_each_call(quick_folder):
    print(f"folder: killed at {kill_a_folder(quick_folder, lambda run, folder: kill_at_calls(run, step=9))} calls")


@pytest.mark.slow
def test_export(quick_folder):
    """The real one, killed at a few of its writes."""
    pytest.importorskip("onnxscript")
    from voco_llama_hf.export import export_onnx

    target, number = quick_folder / "onnx", 0
    model = tiny_model()
    export_onnx(model, target)
    expected = set(os.listdir(target))
    shutil.rmtree(target)
    for killed in kill_at_events(lambda: export_onnx(model, target) and None, quick_folder, step=3):
        number += killed
        assert not target.exists() or set(os.listdir(target)) == expected
        if not target.exists():
            export_onnx(model, target)
        assert os.listdir(quick_folder) == ["onnx"] and set(os.listdir(target)) == expected
        shutil.rmtree(target)
    print(f"export: killed at {number} events")


def test_who_lives_is_left_alone(tmp_path):
    """Two writers of one file: the second removes nothing of the first, and the last one wins."""
    with written_aside(tmp_path / "a.txt") as first:
        first.write_text("first")
        with written_aside(tmp_path / "a.txt") as second:
            second.write_text("second")
        assert first.exists() and (tmp_path / "a.txt").read_text() == "second"
        with pytest.raises(ValueError, match="stop"), written_aside(tmp_path / "a.txt"):
            raise ValueError("stop")
    assert (tmp_path / "a.txt").read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="kinds of files")
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device", "folder"])
def test_only_files_are_replaced(tmp_path, kind):
    target, outside = tmp_path / "out.safetensors", tmp_path / "thesis.txt"
    outside.write_text("years of work")
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    elif kind == "device":
        target = Path("/dev/null")
    else:
        target.symlink_to(outside if kind == "link" else tmp_path / "missing")
    with pytest.raises(FileExistsError, match=f"{target} is a"):
        make_cache(1).save(target)
    assert outside.read_text() == "years of work" and not (tmp_path / "missing").exists()
    if kind == "link":
        outside.unlink()
        outside.mkdir()
        with pytest.raises(FileExistsError, match="is a link"), new_folder(target):
            raise AssertionError
