"""Every road from a file to pixels ends in the same pixels: what a person sees of it."""

import base64
import functools
import http.server
import json
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from images.pictures import COLOURS, ORIENTATION, write_pictures
from modeling.helpers import build_processor, tiny_model
from PIL import Image, ImageOps
from transformers import (
    ImageTextToTextPipeline,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from voco_llama_hf.images import decode_image, open_image
from voco_llama_hf.modeling import images_voco_llama
from voco_llama_hf.store.indexing import FileReader, Sampling
from voco_llama_hf.training.llava_data import load_llava_data


PROCESSOR = build_processor()
TEXT = "<image>what?"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def server(pictures):
    folder = next(iter(pictures.values()))[0].parent

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def pipe():
    return pipeline(
        "image-text-to-text", model=tiny_model(voco_token_id=PROCESSOR.image_token_id), processor=PROCESSOR
    )


def processed(images, **kwargs) -> torch.Tensor:
    return PROCESSOR(images=images, text=TEXT, return_tensors="pt", **kwargs)["pixel_values"]


def with_orientation(value: int) -> Image.Image:
    image = Image.new("RGB", (8, 8))
    image.getexif()[ORIENTATION] = value
    return image


def encoded(path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def chat(part: dict, processor=PROCESSOR, **kwargs) -> torch.Tensor:
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **options, **kwargs)["pixel_values"]


def collated(row: dict) -> torch.Tensor:
    """What TRL's collator makes of a row of a data set."""
    return DataCollatorForVisionLanguageModeling(PROCESSOR)([row])["pixel_values"]


def from_column(path) -> torch.Tensor:
    messages = [[{"role": "user", "content": "what?"}, {"role": "assistant", "content": "that"}]]
    data = Dataset.from_dict({"messages": messages, "image": [str(path)]}).cast_column("image", ImageColumn())
    return collated(data[0])


def from_llava(path) -> torch.Tensor:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    file = path.with_suffix(".jsonl")
    file.write_text(json.dumps({"image": path.name, "conversations": turns}))
    return collated(next(iter(load_llava_data(file, path.parent))))


def from_index(path) -> torch.Tensor:
    return FileReader([str(path)], PROCESSOR.image_processor, Sampling())[0][2]["pixel_values"]


def as_frames(path, frame) -> torch.Tensor:
    """The second of two frames."""
    inputs = PROCESSOR(videos=[[frame(path), frame(path)]], text="<video>what?", return_tensors="pt")
    return inputs["pixel_values"][1:]


ROADS: dict[str, Callable[..., torch.Tensor]] = {
    "path": lambda path: processed(str(path)),
    "pathlib": lambda path: processed([path]),
    "base64": lambda path: processed(encoded(path)),
    "data url": lambda path: processed(f"data:image/{path.suffix[1:]};base64,{encoded(path)}"),
    "PIL": lambda path: processed([ImageOps.exif_transpose(Image.open(path))]),
    "chat with a path": lambda path: chat({"type": "image", "path": str(path)}),
    "chat with base64": lambda path: chat({"type": "image", "base64": encoded(path)}),
    "chat with an image": lambda path: chat({"type": "image", "image": ImageOps.exif_transpose(Image.open(path))}),
    "ask and compress": lambda path: next(PROCESSOR.iter_pixel_values([open_image(path)])),
    "frames of paths": lambda path: next(PROCESSOR.iter_pixel_values([path])),
    "index": from_index,
    "data set column": from_column,
    "LLaVA data": from_llava,
    "serving and demo": lambda path: processed(decode_image(path.read_bytes())),
    "frames": lambda path: as_frames(path, open_image),
    "frames as they are": lambda path: as_frames(path, lambda path: ImageOps.exif_transpose(Image.open(path))),
    "chat with frames": lambda path: chat({"type": "video", "video": [str(path), str(path)]})[1:],
}


def check(pictures, road: Callable[..., torch.Tensor]) -> None:
    wrong = []
    for name, (path, seen) in pictures.items():
        expected = PROCESSOR.image_processor(Image.fromarray(seen.astype(np.uint8)), return_tensors="pt")
        if not torch.equal(road(path), expected["pixel_values"]):
            wrong.append(name)
    assert not wrong


@pytest.mark.parametrize("road", ROADS)
def test_equal_pixels(pictures, road):
    check(pictures, ROADS[road])


def test_equal_pixels_from_a_url(pictures, server):
    check(pictures, lambda path: processed(f"{server}/{path.name}"))
    check(pictures, lambda path: chat({"type": "image", "url": f"{server}/{path.name}"}))
    check(pictures, lambda path: chat({"type": "image_url", "image_url": {"url": f"{server}/{path.name}"}}))


def test_equal_pixels_in_a_pipeline(pictures, pipe, server):
    """Of what is passed as `images=` transformers' pipeline loads the pixels itself."""
    for load in (str, Image.open, lambda path: f"{server}/{path.name}"):
        check(pictures, lambda path, load=load: pipe.preprocess({"images": load(path), "text": TEXT})["pixel_values"])
    path, _ = pictures["RGBA"]
    answer = pipe(images=str(path), text=TEXT, max_new_tokens=2)[0]["generated_text"]
    assert pipe(images=Image.open(path), text=TEXT, max_new_tokens=2)[0]["generated_text"] == answer


def test_a_pipeline_of_another_model_is_transformers_own():
    ours = tiny_model().config
    config = LlavaConfig(text_config=ours.text_config, vision_config=ours.vision_config)
    processor = LlavaProcessor(PROCESSOR.image_processor, PROCESSOR.tokenizer, patch_size=14, image_token="<voco>")
    other = pipeline("image-text-to-text", model=LlavaForConditionalGeneration(config), processor=processor)
    assert type(other) is ImageTextToTextPipeline


def test_an_image_that_someone_opened_lies_as_it_lies(pictures):
    """As transformers' processors have it; a pipeline turns it, as transformers' do."""
    path, _ = pictures["EXIF 6"]
    stored = PROCESSOR.image_processor(Image.fromarray(COLOURS), return_tensors="pt")["pixel_values"]
    assert torch.equal(processed(Image.open(path)), stored)


@pytest.mark.parametrize("array", [np.asarray, torch.as_tensor])
def test_arrays_are_taken_as_they_are(array):
    expected = PROCESSOR.image_processor(Image.fromarray(COLOURS), return_tensors="pt")["pixel_values"]
    assert torch.equal(processed(array(COLOURS)), expected)
    assert torch.equal(processed([array(COLOURS)]), expected)
    assert torch.equal(processed(array(COLOURS.transpose(2, 0, 1).copy())), expected)
    both = PROCESSOR(images=array(np.stack([COLOURS, COLOURS])), text=TEXT * 2, return_tensors="pt")["pixel_values"]
    assert torch.equal(both, expected.repeat(2, 1, 1, 1))


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (np.full((8, 8, 3), 0.5), {}, "floats between 0 and 1"),
        (torch.full((3, 8, 8), 0.5), {}, "floats between 0 and 1"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), {}, "floats between 0 and 1"),
        (np.full((8, 8, 3), 0.5), {"do_rescale": False}, None),
        (np.full((8, 8, 3), 128.0), {}, None),
        (with_orientation(6), {}, "exif_transpose"),
        (with_orientation(1), {}, None),
    ],
)
def test_sure_mistakes_are_warned_of(image, options, message, monkeypatch):
    said = []
    monkeypatch.setattr(images_voco_llama.logger, "warning_once", said.append)
    processed(image, **options)
    assert len(said) == (message is not None)
    assert message is None or message in said[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", r"missing\.png is not an image: expected a URL"),
        ("x" * 100_000, "expected a URL"),
        ("\ud800", "expected a URL"),
        ("a\0b", "expected a URL"),
        ("", "expected a URL|no such image"),
        ("data:image/png;base64,", "expected a URL"),
        ("data:image/png;base64,!!!", "expected a URL"),
        (".", "is a folder"),
        ("/dev/null", "a pipe or a device"),
        ("http://127.0.0.1:1/a.png", "cannot be downloaded"),
        ("http://[", "cannot be downloaded"),
    ],
)
def test_what_is_no_image_is_an_error(source, message):
    with pytest.raises(ValueError, match=message) as error:
        processed(source)
    assert len(str(error.value)) < 1000


def test_errors_of_servers_are_errors(server, pictures):
    with pytest.raises(ValueError, match=r"cannot be downloaded.*404"):
        processed(f"{server}/missing.png")
    path, _ = pictures["RGB"]
    damaged = path.with_name("damaged.png")
    damaged.write_bytes(path.read_bytes()[:60])
    for source in (str(damaged), f"{server}/damaged.png", f"data:image/png;base64,{encoded(damaged)}"):
        with pytest.raises(ValueError, match=r"damaged|cannot be read"):
            processed(source)
