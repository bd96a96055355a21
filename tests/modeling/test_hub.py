"""What `save_pretrained` writes loads where this package is not installed."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
from modeling.helpers import build_processor, tiny_model
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
)
from video_files import make_frames, write_video

from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaModel, VoCoLlamaProcessor
from voco_llama_hf.videos import read_frames


PARTS = (
    "attention",
    "batches",
    "cache",
    "compat",
    "compression",
    "configuration",
    "files",
    "fingerprint",
    "generation",
    "images",
    "injection",
    "layout",
    "llava_next",
    "llava_onevision",
    "modeling",
    "options",
    "outputs",
    "pipeline",
    "placeholders",
    "processing",
    "rotation",
    "runtime",
    "single_pass",
    "tiled_processing",
    "tiles",
    "two_stages",
    "video",
    "weights",
)
SHIPPED = {f"{name}_voco_llama.py" for name in PARTS}
SCRIPT = """
import importlib.util, json, sys
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.utils import logging

assert importlib.util.find_spec("voco_llama_hf") is None
logging.set_verbosity_error()
folder, image, film = sys.argv[1:]
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
processor = AutoProcessor.from_pretrained(folder, **trust)
base = AutoModel.from_pretrained(folder, **trust)
model = AutoModelForImageTextToText.from_pretrained(folder, **trust)
answers = {"classes": [type(part).__name__ for part in (config, processor, base, model)]}

text, options = "<image>what?", {"max_new_tokens": 5}
pipe = pipeline("image-text-to-text", model=folder, **trust)
chat = [{"role": "user", "content": [{"type": "image", "path": image}, {"type": "text", "text": "what?"}]}]
answers["pipeline"] = type(pipe).__name__
transparent = Image.new("RGBA", (9, 9), (0, 0, 0, 0))
pixels = pipe.preprocess({"images": transparent, "text": text})["pixel_values"]
white = processor(images=transparent, return_tensors="pt")["pixel_values"]
answers["white"] = torch.equal(pixels, white) and bool((white > 1).all())
answers["image"] = pipe(images=image, text=text, **options)[0]["generated_text"]
answers["chat"] = pipe(text=chat, **options)[0]["generated_text"][-1]["content"]
answers["k"] = pipe(text=chat, processor_kwargs={"num_voco_tokens": 3}, **options)[0]["generated_text"][-1]["content"]
chat = [{"role": "user", "content": [{"type": "video", "path": film}, {"type": "text", "text": "what?"}]}]
answers["video"] = pipe(text=chat, processor_kwargs={"num_frames": 3}, **options)[0]["generated_text"][-1]["content"]
batch = pipe(images=[image, image], text=[text, text + " and why?"], batch_size=2, **options)
answers["batch"] = [output["generated_text"] for output in batch]

inputs = processor(images=[image], text=text, num_voco_tokens=2, return_tensors="pt")
cache = model.compress(inputs["pixel_values"], num_voco_tokens=2)
cache.save("cat.safetensors")
cache = type(cache).load("cat.safetensors")
cached = processor(text=text, voco_cache=cache, return_tensors="pt")
answers["cache"] = model.generate(**cached, voco_cache=cache, **options).tolist()
answers["pixels"] = model.generate(**inputs, **options).tolist()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny-voco-llama"
    processor = build_processor()
    model = tiny_model(voco_token_id=processor.image_token_id)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory) -> Path:
    """A virtual environment with everything that is installed here but this package."""
    path = tmp_path_factory.mktemp("fresh")
    venv.create(path, with_pip=False, symlinks=True)
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.suffix != ".pth" and "voco_llama" not in entry.name:
            (inside / entry.name).symlink_to(entry)
    return path / "bin" / "python"


def test_the_folder_holds_the_code(folder):
    assert {path.name for path in folder.glob("*.py")} == SHIPPED
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoProcessor",
    }
    assert "AutoProcessor" in json.loads((folder / "processor_config.json").read_text())["auto_map"]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_files_import_nothing_but_what_every_user_has(folder, name):
    import ast

    # NumPy comes with transformers, Pillow with whoever opens images
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse((folder / name).read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1 and f"{node.module}.py" in SHIPPED
            continue
        else:
            continue
        assert {module.split(".")[0] for module in modules} <= allowed


@pytest.mark.parametrize("name", ["configuration", "processing"])
def test_files_that_load_first_name_all_that_they_lead_to(folder, name):
    """Up to transformers 5.0 nothing else is copied from a folder, and the error would be that a file is missing."""

    def named(file: str) -> set[str]:
        return {f"{stem}.py" for stem in re.findall(r"^\s*from \.(\w+) import", (folder / file).read_text(), re.M)}

    reached, new = set(), {f"{name}_voco_llama.py"}
    while new:
        reached |= new
        new = set().union(*map(named, new)) - reached
    assert reached - {f"{name}_voco_llama.py"} == named(f"{name}_voco_llama.py")


def test_auto_classes_find_the_installed_package(folder):
    assert type(AutoConfig.from_pretrained(folder)) is VoCoLlamaConfig
    assert type(AutoProcessor.from_pretrained(folder)) is VoCoLlamaProcessor
    assert type(AutoModel.from_pretrained(folder)) is VoCoLlamaModel
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is VoCoLlamaForConditionalGeneration


def test_weights_load_into_llava_unchanged(folder):
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = VoCoLlamaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all((ours[name] == weight).all() for name, weight in model.state_dict().items())


def test_loads_and_answers_without_the_package(folder, image, fresh_python, tmp_path):
    film = write_video(tmp_path / "film.mp4", make_frames(6))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}
    command = [fresh_python, "-c", SCRIPT, folder, image, film]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout.splitlines()[-1])
    assert answers["classes"] == [
        "VoCoLlamaConfig",
        "VoCoLlamaProcessor",
        "VoCoLlamaModel",
        "VoCoLlamaForConditionalGeneration",
    ]
    assert answers["cache"] == answers["pixels"]
    assert answers["pipeline"] == "VoCoLlamaPipeline" and answers["white"]

    # The same from the installed package, through other methods
    model = VoCoLlamaForConditionalGeneration.from_pretrained(folder)
    processor = VoCoLlamaProcessor.from_pretrained(folder)
    picture = Image.open(image)

    def answer(inputs) -> str:
        output = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(output, skip_special_tokens=True)

    inputs = processor(images=picture, text="<image>what?", return_tensors="pt")
    assert answers["image"] == "<image>what?" + answer(inputs)
    longer = processor(images=picture, text="<image>what? and why?", return_tensors="pt")
    assert answers["batch"] == [answers["image"], "<image>what? and why?" + answer(longer)]
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    assert answers["chat"] == answer(processor.apply_chat_template(chat, **options))
    chat[0]["content"][0] = {"type": "video", "video": list(read_frames(film, num_frames=3))}
    assert answers["video"] == answer(processor.apply_chat_template(chat, **options))
    chat[0]["content"][0] = {"type": "image", "image": picture}
    with_three = processor.apply_chat_template(chat, **options, processor_kwargs={"num_voco_tokens": 3})
    assert answers["k"] == answer(with_three)
