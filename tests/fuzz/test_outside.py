"""Names and links of others that lead out of their folder, through every command that reads or writes files."""

import json
import os
import shutil
from pathlib import Path

import pytest
from cli.conftest import save_checkpoint

from voco_llama_hf.files import check_inside, inside
from voco_llama_hf.hub import write_card
from voco_llama_hf.hub.push import plan_push


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("saved"), seed=0)


@pytest.fixture
def model(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../a", "/a", "a/b", "a\\b", "C:a", "a\0", None, 5, ["a"], "a" * 5 + "/"]
)
def test_names(tmp_path, name):
    with pytest.raises(ValueError, match="is not the name of a file in"):
        inside(tmp_path, name)
    assert inside(tmp_path, "..a b.safetensors") == tmp_path / "..a b.safetensors"


@pytest.mark.parametrize("name", ["secret.png", "extra.safetensors", "onnx/decoder.onnx", "README.md", "results.json"])
def test_push_follows_no_link(model, tmp_path, name):
    (tmp_path / "secret").write_text("{}")
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"{name} is a link out of .*model, to .*secret: put a copy in its place"):
        plan_push(model, "name/model")


def test_push_of_a_folder_that_is_a_link(model, tmp_path):
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "decoder.onnx").write_text("secret")
    (model / "onnx").symlink_to(tmp_path / "graphs")
    with pytest.raises(ValueError, match=r"decoder\.onnx is a link out of"):
        plan_push(model, "name/model")


def test_push_of_a_snapshot(saved, tmp_path):
    """In the Hub's cache every file is a link to a blob beside the snapshots."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in saved.iterdir():
        shutil.copyfile(file, blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert any(file.path == "model.safetensors" for file in plan_push(snapshot, "name/model").files)
    check_inside(snapshot, snapshot / "config.json")
    (snapshot / "more.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="is a link out of"):
        check_inside(snapshot, snapshot / "more.md")


@pytest.mark.parametrize("name", ["README.md", "attention.png"])
def test_a_card_writes_through_no_link(model, tmp_path, name):
    (tmp_path / "thesis").write_text("years of work")
    (model / name).symlink_to(tmp_path / "thesis")
    if name == "README.md":
        with pytest.raises(ValueError, match="is a link out of"):
            write_card(model)
    else:
        write_card(model)
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert not list(model.glob("*.part"))


@pytest.mark.parametrize("name", ["../secret.safetensors", "{outside}/secret.safetensors", 7])
def test_convert_reads_nothing_outside(model, tmp_path, name):
    """The index of a checkpoint names its shards."""
    from voco_llama_hf.conversion.convert import convert_checkpoint

    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    shutil.move(model / "model.safetensors", tmp_path / "secret.safetensors")
    name = name.format(outside=tmp_path) if isinstance(name, str) else name
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ValueError, match="is not the name of a file in"):
        convert_checkpoint(model, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def make_target(folder: Path, kind: str) -> Path:
    target = folder / "out.json"
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "device":
        target.symlink_to("/dev/null")
    else:
        (folder / "thesis").write_text("years of work")
        target.symlink_to(folder / ("thesis" if kind == "link" else "missing"))
    return target


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "device"])
@pytest.mark.parametrize("command", ["compress", "evaluate", "benchmark", "export", "convert"])
def test_outputs_that_are_no_files(invoke, model, images, tmp_path, command, kind):
    target = make_target(tmp_path, kind)
    args = {
        "compress": ["compress", "--model", model, images[0], "--output", target, "--force"],
        "evaluate": ["evaluate", "--model", model, "--output", target, "--force", "--limit", 1],
        "benchmark": ["benchmark", "--output", target, "--force"],
        "export": ["export", "onnx", model, target],
        "convert": ["convert", model, target],
    }[command]
    code = 1 if command in ("export", "convert") else 2
    assert "out.json" in invoke(*args, exit_code=code).stderr
    assert (os.path.lexists(target) and not target.is_file()) or kind == "link"
    assert kind != "link" or (tmp_path / "thesis").read_text() == "years of work"
    assert not (tmp_path / "missing").exists()


def test_index_of_odd_names(invoke, saved, images, tmp_path):
    """A name that is no text is indexed, asked for and shown; a pipe is one failure."""
    odd = os.fsencode(tmp_path) + b"/photos/caf\xe9\x1b[31m.png"
    (tmp_path / "photos").mkdir()
    shutil.copyfile(images[0], odd)
    shutil.copyfile(images[1], tmp_path / "photos" / "b.png")
    os.mkfifo(os.fsencode(tmp_path) + b"/photos/pipe\xff.png")
    (tmp_path / "photos" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    store = tmp_path / "store"
    result = invoke("index", tmp_path / "photos", "--store", store, "--model", saved)
    assert "2 entries" in result.stdout and "4 files found, 2 cannot be read" in result.stdout
    assert "pipe\\udcff.png" in result.stderr and "is a pipe, a socket or a device" in result.stderr
    shown = invoke("store", "info", store, "--files").stdout
    assert "caf\\udce9\\x1b[31m.png" in shown and "\x1b" not in shown
    name = os.fsdecode(b"caf\xe9\x1b[31m.png")
    assert invoke("ask", "--model", saved, "--store", store, "--image", name, "What?").stdout
    assert "1 entry removed" in invoke("store", "remove", store, name).stdout
    assert "no such" not in invoke("store", "verify", store).stdout
