import json
import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.images import open_image


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def ask(invoke, checkpoint):
    return lambda *args, **kwargs: invoke("ask", "--model", checkpoint, "--max-new-tokens", 6, *args, **kwargs)


@pytest.fixture
def cache(invoke, checkpoint, images) -> Path:
    """The images, at k=2."""
    path = images[0].parent / "cache.safetensors"
    invoke("compress", "--model", checkpoint, "-k", 2, "--output", path, *images)
    return path


def answer_in_python(checkpoint, images, text, k) -> str:
    model = VoCoLlamaForConditionalGeneration.from_pretrained(checkpoint)
    processor = VoCoLlamaProcessor.from_pretrained(checkpoint)
    pictures = [open_image(image) for image in images]
    inputs = processor(images=pictures, text=text, num_voco_tokens=k, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_answers_as_python_does(ask, checkpoint, images):
    text = "user: <image>What is this?assistant: "
    assert ask(images[0], "What is this?").stdout.strip() == answer_in_python(checkpoint, images[:1], text, 1)
    text = "user: <image><image>What differs?assistant: "
    assert ask(*images[:2], "What differs?", "-k", 3).stdout.strip() == answer_in_python(
        checkpoint, images[:2], text, 3
    )


def test_without_chat_template(invoke, checkpoint, images, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).symlink_to(file)
    answer = invoke("ask", "--model", model, "--max-new-tokens", 6, images[0], "What?").stdout.strip()
    assert answer == answer_in_python(checkpoint, images[:1], "<image>\nWhat?", 1)


def test_cache_answers_as_its_images_do(ask, images, cache):
    assert ask("--cache", cache, "What?").stdout == ask(*images, "What?", "-k", 2).stdout
    assert ask("--cache", cache, "What?", "-k", 2).stdout == ask("--cache", cache, "What?").stdout


@pytest.mark.parametrize("repeats", [3000, 300_000])
def test_a_prompt_beyond_the_window_is_refused(ask, cache, repeats):
    """With both numbers, and without reading more of it than it takes to know."""
    message = ask("--cache", cache, "who " * repeats, exit_code=1 if repeats == 3000 else 2).stderr
    assert re.search(
        r"the prompt has (more than )?\d+ tokens, but this model reads at most \d+ with the answer", message
    )


def test_stats(ask, images, cache):
    result = ask(*images, "What?", "-k", 2, "--stats")
    assert "vision" not in result.stdout
    # 3 images of 4 vision tokens; keys and values of 3 layers, 2 heads of size 16 in float32 are 768 bytes a token
    assert re.search(r"tokens +12 vision -> 6 VoCo", result.stderr)
    assert re.search(r"key-value cache +9\.2 kB -> 4\.6 kB", result.stderr)
    assert re.search(r"compress +\d+ ms", result.stderr)
    assert re.search(r"answer +\d+ ms for 6 tokens", result.stderr)
    assert re.search(r"compress +done before", ask("--cache", cache, "What?", "--stats").stderr)


def test_dtype_and_device(ask, images):
    assert "4.6 kB -> 768 B" not in ask(images[0], "What?", "-k", 2, "--stats", "--device", "cpu").stderr
    assert "1.5 kB -> 768 B" in ask(images[0], "What?", "-k", 2, "--stats", "--dtype", "bfloat16").stderr


@pytest.mark.parametrize("picture", [(1, 1), (4000, 5)])
def test_odd_images(ask, tmp_path, picture):
    Image.new("RGB", picture, "red").save(tmp_path / "odd.png")
    ask(tmp_path / "odd.png", "What?")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "Missing argument 'QUESTION'"),
        (["What?"], "no image"),
        (["{image}"], "the question comes last, but .* is a file"),
        (["What?", "{image}"], "the question comes last, but .* is a file"),
        (["{image}", ""], "the question is empty"),
        (["{image}", " "], "the question is empty"),
        (["{image}", "a <image>?"], "the question has <image> in it"),
        (["{image}", "a <voco>?"], "the question has <voco> in it"),
        (["{image}", "What?", "--cache", "{cache}"], "give images or --cache, not both"),
        (["{image}", "What?", "-k", "0"], "Invalid value for .--num-voco-tokens"),
        (["{image}", "What?", "-k", "two"], "Invalid value for .--num-voco-tokens"),
        (["{image}", "What?", "--max-new-tokens", "0"], "Invalid value for .--max-new-tokens"),
        (["{image}", "What?", "--device", "abacus"], "no device 'abacus' here, there is cpu"),
        (["{image}", "What?", "--device", "cuda:99"], "no device 'cuda:99' here, there is cpu"),
        (["{image}", "What?", "--dtype", "int8"], "'int8' is not one of"),
        (["{image}", "What?", "--nope"], "No such option"),
    ],
)
def test_usage_errors(ask, images, cache, args, message):
    args = [arg.format(image=images[0], cache=cache) for arg in args]
    assert re.search(message, ask(*args, exit_code=2).stderr)


def test_bad_images(ask, images, tmp_path):
    assert "no such image" in ask(tmp_path / "missing.png", "What?", exit_code=1).stderr
    assert "is a folder" in ask(tmp_path, "What?", exit_code=1).stderr
    (tmp_path / "text.png").write_text("not a picture")
    assert "is not an image" in ask(images[0], tmp_path / "text.png", "What?", exit_code=1).stderr
    images[1].write_bytes(images[1].read_bytes()[:100])
    assert "is damaged" in ask(images[1], "What?", exit_code=1).stderr


def test_too_many_voco_tokens(ask, images):
    assert "at most 576, got 10000" in ask(images[0], "What?", "-k", 10_000, exit_code=1).stderr


def test_bad_caches(ask, invoke, images, cache, other_checkpoint, tmp_path):
    assert "no VoCoCache file" in ask("--cache", tmp_path / "missing", "What?", exit_code=1).stderr
    assert "no VoCoCache file" in ask("--cache", tmp_path, "What?", exit_code=1).stderr
    assert "not a readable safetensors file" in ask("--cache", images[0], "What?", exit_code=1).stderr
    assert "num_voco_tokens=1" in ask("--cache", cache, "What?", "-k", 1, exit_code=1).stderr
    result = invoke("ask", "--model", other_checkpoint, "--cache", cache, "What?", exit_code=1)
    assert "made by another model" in result.stderr
    content = bytearray(cache.read_bytes())
    content[-1] ^= 1
    cache.write_bytes(content)
    assert "is damaged" in ask("--cache", cache, "What?", exit_code=1).stderr
    cache.write_bytes(content[:-100])
    assert "not a readable safetensors file" in ask("--cache", cache, "What?", exit_code=1).stderr


@pytest.fixture
def model_copy(checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    return model


def test_a_model_of_the_package_by_its_name(invoke):
    root = EXAMPLES.parent
    example = json.loads((root / "tests" / "fixtures" / "twelve_objects.json").read_text())["questions"]
    picture = root / "docs" / "source" / "images" / "twelve_objects.png"
    ask = ["ask", "--model", "voco-scenes-576", picture, "-k", 1]
    # One question of every family, read from one token instead of 576
    assert [invoke(*ask, row["question"]).stdout.strip() for row in example] == [row["answer"] for row in example]
    assert "576 vision -> 1 VoCo" in " ".join(invoke(*ask, "--stats", example[0]["question"]).stderr.split())


def test_not_a_model(invoke, images, tmp_path):
    for model, message in (
        (tmp_path / "missing", "no such model folder"),
        ("", "no such model folder"),
        ("not a model", "no such model folder"),
        (images[0], "is a file"),
        (tmp_path, "has no config.json"),
    ):
        assert message in invoke("ask", "--model", model, images[0], "What?", exit_code=2).stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "run voco-llama convert"),
        ({"model_type": "bert"}, "is a bert model, not a voco_llama one"),
        ({"text_config": None}, "has no text_config"),
        ({"num_voco_tokens": 0}, "cannot be loaded"),
    ],
)
def test_bad_config(invoke, images, model_copy, changes, message):
    config = json.loads((model_copy / "config.json").read_text())
    config = {name: value for name, value in {**config, **changes}.items() if value is not None}
    (model_copy / "config.json").write_text(json.dumps(config))
    assert message in invoke("ask", "--model", model_copy, images[0], "What?", exit_code=1).stderr


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "not a valid JSON file"),
        ("processor_config.json", "the processor of .* cannot be loaded"),
        ("tokenizer.json", "the processor of .* cannot be loaded"),
        ("model.safetensors", "the model .* cannot be loaded"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "garbage"])
def test_incomplete_model(invoke, images, model_copy, file, message, damage):
    (model_copy / file).unlink()
    if damage == "garbage":
        (model_copy / file).write_text("{")
    is_no_model = (file, damage) == ("config.json", "missing")
    result = invoke("ask", "--model", model_copy, images[0], "What?", exit_code=2 if is_no_model else 1)
    assert re.search("has no config.json" if is_no_model else message, result.stderr)


def test_weights_that_do_not_fit(invoke, images, model_copy):
    weights = load_file(model_copy / "model.safetensors")
    name = next(name for name in weights if "mlp" in name)
    del weights[name]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    result = invoke("ask", "--model", model_copy, images[0], "What?", exit_code=1)
    assert re.search("1 weights of .* are missing or have another shape", result.stderr)


@pytest.mark.parametrize("k", [1, 2])
def test_embedded_model_reads_the_example(invoke, k):
    rows = json.loads((EXAMPLES / "scene.json").read_text())["questions"]
    answers = [invoke("ask", EXAMPLES / "scene.png", row["question"], "-k", k).stdout.strip() for row in rows]
    # One question of every family
    assert answers == [row["answer"] for row in rows]
