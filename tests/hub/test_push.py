"""A model is pushed to a Hub on loopback, and loaded from there by a fresh process."""

import json
import os
import subprocess
import sys

import pytest
from hub.hub_server import TOKEN, LocalHub
from huggingface_hub import constants
from modeling.helpers import build_processor, tiny_model
from PIL import Image

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.hub.push import plan_push, push_model


LOAD = """
import json, re, sys
from huggingface_hub import ModelCard
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

repo, image = sys.argv[1:]
trust = {"trust_remote_code": True}
model = AutoModelForImageTextToText.from_pretrained(repo, **trust)
processor = AutoProcessor.from_pretrained(repo, **trust)
module = type(model).__module__
pipe = pipeline("image-text-to-text", model=repo, **trust)
answer = pipe(images=image, text="<image>what?", max_new_tokens=5)[0]["generated_text"]
card = ModelCard.load(repo)
code = re.search(r"```python\\n(.*?)```", card.text, re.DOTALL)[1]
exec(compile(code, "quick start", "exec"), {})
print(json.dumps({"module": module, "answer": answer, "tag": card.data.pipeline_tag}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, processor = tmp_path_factory.mktemp("push") / "tiny", build_processor()
    tiny_model(voco_token_id=processor.image_token_id).save_pretrained(path, max_shard_size="200KB")
    processor.save_pretrained(path)
    (path / "onnx").mkdir()
    (path / "onnx" / "decoder_model.onnx").write_bytes(b"graph" * 100)
    (path / "optimizer.pt").write_bytes(b"state")
    (path / ".env").write_text("SECRET=1")
    (path / "checkpoint-5").mkdir()
    (path / "checkpoint-5" / "model.safetensors").write_bytes(b"old")
    return path


@pytest.fixture
def hub():
    with LocalHub() as server:
        yield server


@pytest.fixture
def online(hub, monkeypatch):
    """This process talks to the Hub on loopback."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def run(hub, home, *command) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd=home)


def test_push_breaks_off_is_repeated_and_loads(hub, folder, tmp_path):
    """The connection is cut in the middle of the weights, which is mended on the way, and before the commit."""
    hub.drop = ["lfs", "commit"]
    push = [sys.executable, "-m", "voco_llama_cli", "push", folder, "org/tiny-voco", "--private"]
    first = run(hub, tmp_path, *push)
    assert first.returncode == 1 and not hub.drop
    assert "was lost" in first.stderr and "run the same command again" in first.stderr
    assert "Traceback" not in first.stderr
    repository = hub.repositories["org/tiny-voco"]
    assert repository.private and repository.files == {}
    uploaded = list(hub.uploads)
    assert len(uploaded) == len(hub.lfs) + 1  # one was sent twice

    second = run(hub, tmp_path, *push)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines()[-1] == f"{hub.endpoint}/org/tiny-voco/commit/{repository.commits[-1]}"
    assert hub.uploads == uploaded  # nothing large again
    weights = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(weights) > 1
    assert {*weights, "README.md", "modeling_voco_llama.py", "onnx/decoder_model.onnx"} <= set(repository.files)
    assert not [path for path in repository.files if path.startswith((".", "optimizer", "checkpoint"))]
    assert b'model_id = "org/tiny-voco"' in repository.files["README.md"]
    assert not (folder / "README.md").exists()

    image = tmp_path / "image.png"
    Image.linear_gradient("L").convert("RGB").save(image)
    (home := tmp_path / "empty").mkdir()
    loaded = run(hub, home, sys.executable, "-c", LOAD, "org/tiny-voco", image)
    assert loaded.returncode == 0, loaded.stderr
    found = json.loads(loaded.stdout.splitlines()[-1])
    assert found["module"].startswith("transformers_modules.org")
    assert found["tag"] == "image-text-to-text"
    model, processor = (
        part.from_pretrained(folder) for part in (VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor)
    )
    inputs = processor(images=Image.open(image), text="<image>what?", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert found["answer"] == "<image>what?" + processor.decode(ids, skip_special_tokens=True)


def test_a_lost_response(online, folder):
    """The commit was made, but nobody heard: the next call finds nothing left to do."""
    online.drop = ["response"]
    with pytest.raises(ConnectionError, match="run the same command again"):
        push_model(folder, "org/tiny")
    repository = online.repositories["org/tiny"]
    assert len(repository.commits) == 2 and not repository.private
    commit = push_model(folder, "org/tiny")
    assert commit.oid == repository.commits[-1] and len(repository.commits) == 2


def test_pull_request(online, folder):
    push_model(folder, "org/tiny")
    files = dict(online.repositories["org/tiny"].files)
    (folder / "results.json").write_text(
        '{"split": "test", "accuracy": {"k=1": {"dense": {"all": 0.5}}}, "blind": {}}'
    )
    try:
        commit = push_model(folder, "org/tiny", create_pr=True)
    finally:
        (folder / "results.json").unlink()
    repository = online.repositories["org/tiny"]
    assert commit.pr_url == f"{online.endpoint}/org/tiny/discussions/1"
    assert repository.files == files
    assert b"| k = 1 | 50.0 |" in repository.pull_requests[0]["README.md"]


def test_without_permission(online, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(OSError, match="401"):
        push_model(folder, "org/tiny")
    assert online.repositories == {} and online.lfs == {}


def test_a_folder_without_code_gets_it(folder, tmp_path):
    """The embedded checkpoint is one: the package is its code."""
    for path in folder.iterdir():
        if path.is_file() and path.suffix != ".py":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    code = {file.path for file in plan_push(tmp_path, "org/tiny").files if file.path.endswith(".py")}
    assert code == {path.name for path in folder.glob("*.py")}
