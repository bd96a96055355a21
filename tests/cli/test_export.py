import importlib.metadata
import re
import shutil
import sys

import pytest
from modeling.helpers import build_processor, tiny_model
from PIL import Image


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    """One layer: exports in seconds."""
    folder, processor = tmp_path_factory.mktemp("small"), build_processor()
    tiny_model(voco_token_id=processor.image_token_id, text={"num_hidden_layers": 1}).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def optimum_cli(monkeypatch, *args) -> int:
    """Exit code of `optimum-cli`, which finds our command in its namespace."""
    from optimum.commands.optimum_cli import main

    monkeypatch.setattr(sys, "argv", ["optimum-cli", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code or 0


def test_export_by_optimum_cli(monkeypatch, capsys, small_checkpoint, images, tmp_path):
    """It is the command of `voco-llama`: a table, and a folder that answers."""
    monkeypatch.setenv("COLUMNS", "200")
    habits = ["--task", "image-text-to-text", "--device", "cpu", "--trust-remote-code", "--framework", "pt"]
    habits += ["--cache_dir", tmp_path / "cache", "--atol", "0.01"]
    assert optimum_cli(monkeypatch, "export", "onnx", "--model", small_checkpoint, *habits, tmp_path / "onnx") == 0
    output = capsys.readouterr().out
    assert len(re.findall(r"compressor +num_images \d, num_voco_tokens \d", output)) == 3
    assert re.search(r"decoder +batch_size 4, sequence_length 9, past_length 4 +\S+e-0\d", output)
    assert re.search(r"\d+ of \d+ tokens of PyTorch's answers are the same", output)
    assert re.search(r"onnx: decoder \d+\.\d kB\n", output)

    from voco_llama_hf import VoCoLlamaProcessor
    from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration

    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "onnx")
    processor = VoCoLlamaProcessor.from_pretrained(tmp_path / "onnx")
    inputs = processor(images=Image.open(images[0]), text="<image>\nWhat?", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3


def test_optimum_cli_with_another_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert optimum_cli(monkeypatch, "export", "onnx", "--model", tmp_path, tmp_path / "new") == 1
    assert "is a llama model, not a voco_llama one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--task", "text-generation"], "invalid choice: 'text-generation'"),
        (["--device", "abacus"], "no device 'abacus' here, there is cpu"),
        (["--atol", "-1"], "Invalid value for '--atol'"),
    ],
)
def test_optimum_cli_means_what_it_takes(monkeypatch, capsys, small_checkpoint, tmp_path, flags, message):
    assert optimum_cli(monkeypatch, "export", "onnx", "--model", small_checkpoint, *flags, tmp_path / "new") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_a_cache_of_its_own(invoke, small_checkpoint, images, tmp_path):
    """From the Hub to a folder that is named, asked about a picture of one's own."""
    cached = tmp_path / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(small_checkpoint, cached / "snapshots" / ("0" * 40))
    asked = ["--image", images[0], "--question", "What is this?"]
    result = invoke("export", "onnx", "someone/small", tmp_path / "new", "--cache-dir", tmp_path, *asked)
    # Two numbers of VoCo tokens, one picture, one question, sixteen tokens
    assert "32 of 32 tokens" in result.stdout
    assert (tmp_path / "new" / "decoder_model.onnx").exists()


def test_an_old_transformers(invoke, small_checkpoint, tmp_path, monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.22" if name == "transformers" else real(name))
    for name in [name for name in sys.modules if name.startswith("voco_llama_hf.export")]:
        monkeypatch.delitem(sys.modules, name)
    error = invoke("export", "onnx", small_checkpoint, tmp_path / "new", exit_code=2).stderr
    assert "transformers>=5.23 is required" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        ([], 2, "Missing argument 'MODEL'"),
        (["{model}"], 2, "Missing argument 'OUTPUT'"),
        (["{empty}", "{new}"], 2, "is not a model folder: it has no config.json"),
        (["{other}", "{new}"], 1, "is a llama model, not a voco_llama one"),
        (["{model}", "{model}"], 1, "already exists and is not empty"),
        (["{model}", "{empty}/no/where"], 1, "no is not a folder: where cannot be written there"),
        (["{model}", "{new}", "--provider", "AbacusExecutionProvider"], 1, "no AbacusExecutionProvider, it has"),
        (["{model}", "{new}", "--precision", "fp8"], 2, "'fp8' is not one of"),
        (["{model}", "{new}", "--precision", "bf16"], 1, "has no bf16 kernels"),
        (["{model}", "{new}", "--opset", "3"], 2, "Invalid value for '--opset'"),
        (["{model}", "{new}", "--image", "nowhere.png"], 1, "no such image: nowhere.png"),
        (["{model}", "{new}", "--question", "What is <image>?"], 1, "the question has <image> in it"),
        (["{model}", "{new}", "--device", "abacus"], 2, "no device 'abacus' here"),
    ],
)
def test_errors(invoke, small_checkpoint, tmp_path, args, exit_code, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    places = {name: tmp_path / name for name in ("empty", "other", "new")} | {"model": small_checkpoint}
    args = [arg.format(**places) for arg in args]
    assert message in invoke("export", "onnx", *args, exit_code=exit_code).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "other"]


def test_name_beside_optimum_onnx(tmp_path, monkeypatch):
    """If optimum-onnx is installed its command keeps its name."""
    from optimum.commands.register.register_voco_llama import command_name

    assert command_name() == "onnx"
    (tmp_path / "optimum_onnx-0.1.0.dist-info").mkdir()
    (tmp_path / "optimum_onnx-0.1.0.dist-info" / "METADATA").write_text("Name: optimum-onnx\nVersion: 0.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert command_name() == "onnx-voco"
