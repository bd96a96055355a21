import shutil

import pytest


def test_card(invoke, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    result = invoke(
        "card", tmp_path / "model", "--license", "mit", "--base-model", "org/base", "--dataset", "org/data"
    )
    assert result.stdout == f"{tmp_path / 'model' / 'README.md'}\n"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "license: mit\n" in card and "base_model_relation: finetune\n" in card and "- org/data\n" in card
    assert 'model_id = "model"' in card and str(tmp_path) not in card


def test_dry_run_lists_and_sends_nothing(invoke, checkpoint, tmp_path):
    """Offline: a request would be an error."""
    shutil.copytree(checkpoint, tmp_path / "model")
    (tmp_path / "model" / "optimizer.pt").write_bytes(b"state")
    lines = invoke("push", tmp_path / "model", "org/model", "--dry-run").stdout.splitlines()
    listed = {line.split()[0] for line in lines if line.strip()}
    assert {"README.md", "attention.png", "model.safetensors", "modeling_voco_llama.py", "tokenizer.json"} <= listed
    assert "left out: optimizer.pt" in lines and lines[-1] == "nothing was sent to org/model"
    assert not (tmp_path / "model" / "README.md").exists()


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        (["card", "{none}"], 2, "no such model folder"),
        (["card", "{empty}"], 2, "is not a model folder: it has no config.json"),
        (["card", "{model}", "--results", "{none}"], 2, "no such file of results"),
        (
            ["card", "{model}", "--results", "{model}/config.json"],
            1,
            "is not what voco-llama evaluate --output writes",
        ),
        (["card", "{model}", "--relation", "cousin"], 2, "'cousin' is not one of"),
        (["push", "{model}"], 2, "Missing argument 'REPO'"),
        (["push", "{model}", "model"], 2, "REPO is the name of a repository"),
        (["push", "{empty}", "org/model"], 2, "it has no config.json"),
        (["push", "{weightless}", "org/model"], 1, "has no weights in safetensors files"),
    ],
)
def test_errors(invoke, checkpoint, tmp_path, args, exit_code, message):
    (tmp_path / "empty").mkdir()
    shutil.copytree(checkpoint, tmp_path / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    places = {name: tmp_path / name for name in ("empty", "weightless", "none")} | {"model": checkpoint}
    args = [arg.format(**places) for arg in args]
    assert message in invoke(*args, exit_code=exit_code).stderr
    assert not (tmp_path / "weightless" / "README.md").exists()
