"""The model on ONNX Runtime against the PyTorch model that it was exported from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import random_inputs, random_pixels
from transformers import DynamicCache, StaticCache, pipeline, set_seed
from transformers.generation.streamers import BaseStreamer

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx
from voco_llama_hf.prompts import build_prompt
from voco_llama_hf.scenes.still import make_scene


TOLERANCE = {"atol": 1e-3, "rtol": 0}
LAYOUTS = [
    ["text:3", "image:2", "text:4"],
    ["image:1", "text:2", "image:3", "text:2"],
    ["text:5"],
    ["image:2", "image:1", "text:1"],
]


@pytest.fixture(scope="module")
def inputs(torch_model):
    return random_inputs(torch_model, LAYOUTS)


def cut(inputs: dict, part: slice) -> dict:
    """Some columns of a batch without its images."""
    return {name: inputs[name][:, part] for name in ("input_ids", "attention_mask")}


@st.composite
def layouts(draw):
    part = st.builds("{}:{}".format, st.sampled_from(["text", "image"]), st.integers(1, 3))
    return [[*draw(st.lists(part, max_size=4)), "text:2"] for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=30, deadline=None)
@given(layouts=layouts(), side=st.sampled_from(["left", "right"]), seed=st.integers(0, 9))
def test_logits_and_cache(torch_model, ort_model, layouts, side, seed):
    """Every logit of text, and every key and value, of any batch."""
    inputs = random_inputs(torch_model, layouts, side, seed)
    expected = torch_model(**inputs, use_cache=True)
    outputs = ort_model(**inputs)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != torch_model.config.voco_token_id)
    torch.testing.assert_close(outputs.logits[text], expected.logits[text], **TOLERANCE)
    real = inputs["attention_mask"].bool()
    for layer, expected_layer in zip(outputs.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for states, reference in ((layer.keys, expected_layer.keys), (layer.values, expected_layer.values)):
            torch.testing.assert_close(states.transpose(1, 2)[real], reference.transpose(1, 2)[real], **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.9},
        {"prefill_chunk_size": 3},
        {"prefill_chunk_size": 1},
        {"repetition_penalty": 1.3},
    ],
)
def test_generate(torch_model, ort_model, inputs, options):
    arguments = {"do_sample": False, "max_new_tokens": 8, **options}
    answers = []
    for model in (torch_model, ort_model):
        set_seed(0)
        answers.append(model.generate(**inputs, **arguments))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_strings": ["a", "b", "c", "e", "k"], "tokenizer": "own"},
        {"token_healing": True, "tokenizer": "own"},
        {"logits_to_keep": 1},
        {"attention_mode": "voco"},
        {"num_items_in_batch": 3},
        {"return_dict_in_generate": True, "output_scores": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_of_generate(torch_model, ort_model, processor, options):
    inputs = random_inputs(torch_model, [["image:2", "text:4"]])
    if "tokenizer" in options:
        options = {**options, "tokenizer": processor.tokenizer}
    answers = [
        model.generate(**inputs, do_sample=False, max_new_tokens=6, **options) for model in (torch_model, ort_model)
    ]
    if "return_dict_in_generate" in options:
        torch.testing.assert_close(torch.stack(answers[1].scores), torch.stack(answers[0].scores), **TOLERANCE)
        answers = [answer.sequences for answer in answers]
    assert torch.equal(*answers)


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep(torch_model, ort_model, kept):
    inputs = random_inputs(torch_model, [["text:3", "image:2", "text:4"]])
    expected = torch_model(**inputs, logits_to_keep=kept).logits
    logits = ort_model(**inputs, logits_to_keep=kept).logits
    text = (logits != 0).any(-1)
    assert logits.shape == expected.shape and text.any()
    torch.testing.assert_close(logits[text], expected[text], **TOLERANCE)
    assert torch.equal(ort_model(**inputs, logits_to_keep=kept, return_dict=False)[0], logits)


def test_caches_of_either_are_taken_by_the_other(torch_model, ort_model, inputs, tmp_path):
    """Images compressed by PyTorch, through a file, and by ONNX Runtime."""
    pixels, counts = inputs["pixel_values"], inputs["num_voco_tokens"]
    by_torch, by_onnx = torch_model.compress(pixels, counts), ort_model.compress(pixels, counts, batch_size=2)
    torch.testing.assert_close(by_onnx.keys, by_torch.keys, **TOLERANCE)
    torch.testing.assert_close(by_onnx.values, by_torch.values, **TOLERANCE)
    assert (by_onnx.token_counts, by_onnx.fingerprint) == (by_torch.token_counts, by_torch.fingerprint)
    by_torch.save(tmp_path / "cache.safetensors")
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    loaded = VoCoCache.load(tmp_path / "cache.safetensors")
    expected = torch_model.generate(**text, voco_cache=by_torch, do_sample=False, max_new_tokens=6)
    assert torch.equal(ort_model.generate(**text, voco_cache=loaded, do_sample=False, max_new_tokens=6), expected)
    assert torch.equal(torch_model.generate(**text, voco_cache=by_onnx, do_sample=False, max_new_tokens=6), expected)


def test_conversation(torch_model, ort_model):
    """Turns that bring images one by one, in one cache."""
    inputs = random_inputs(torch_model, [["image:2", "text:3", "text:4", "image:1", "text:3"]])
    answers = []
    for model in (torch_model, ort_model):
        cache, ids, images = DynamicCache(), inputs["input_ids"][:, :5], 1
        for _ in range(2):
            ids = model.generate(
                input_ids=ids,
                pixel_values=inputs["pixel_values"][:images],
                num_voco_tokens=inputs["num_voco_tokens"][:images],
                past_key_values=cache,
                do_sample=False,
                max_new_tokens=4,
            )
            ids, images = torch.cat([ids, inputs["input_ids"][:, 5:]], dim=1), 2
        answers.append(ids)
    assert torch.equal(*answers)


def test_a_cache_of_pytorch_goes_on(torch_model, ort_model, inputs):
    """The first tokens by PyTorch, the others by ONNX Runtime: keys and values are the same thing."""
    length = inputs["input_ids"].shape[1]
    expected = torch_model(**inputs, use_cache=True).logits[:, -1]
    begun = torch_model(
        **{**inputs, **cut(inputs, slice(length - 1))}, position_ids=torch.arange(length - 1)[None], use_cache=True
    )
    outputs = ort_model(
        input_ids=inputs["input_ids"][:, -1:],
        attention_mask=inputs["attention_mask"],
        past_key_values=begun.past_key_values,
    )
    torch.testing.assert_close(outputs.logits[:, -1], expected, **TOLERANCE)


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value)

    def end(self):
        self.ended = True


def test_streamer(torch_model, ort_model):
    inputs = random_inputs(torch_model, [["image:2", "text:3"]])
    streamer = Collector()
    ids = ort_model.generate(**inputs, streamer=streamer, do_sample=False, max_new_tokens=5)
    assert torch.cat([piece.flatten() for piece in streamer.pieces]).tolist() == ids[0].tolist()
    assert streamer.ended and len(streamer.pieces) == 6


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """The embedded checkpoint in PyTorch and on ONNX Runtime, and its processor."""
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    processor = VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
    folder = tmp_path_factory.mktemp("onnx") / "embedded"
    export_onnx(model, folder, processor)
    return model, ORTVoCoLlamaForConditionalGeneration.from_pretrained(folder), processor


def greedy_answers(model, processor, num_questions: int, batch_size: int = 10) -> list[str]:
    """Answers to questions about unseen scenes, each with its picture."""
    answers: list[str] = []
    for index in range(-(-num_questions // batch_size)):
        scene = make_scene("test", index, questions_per_scene=batch_size)
        inputs = processor(
            images=[scene["image"]] * batch_size,
            text=[build_prompt(processor, ["image"], question) for question in scene["questions"]],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        answers += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def test_answers_of_the_embedded_checkpoint(embedded):
    model, ort_model, processor = embedded
    answers = greedy_answers(ort_model, processor, 30)
    assert answers == greedy_answers(model, processor, 30)
    assert len(set(answers)) > 5


def test_pipeline(embedded):
    model, ort_model, processor = embedded
    content = [
        {"type": "image", "image": make_scene("test", 0)["image"]},
        {"type": "text", "text": "What colour is the circle?"},
    ]
    answers = [
        pipeline("image-text-to-text", model=network, processor=processor)(
            text=[{"role": "user", "content": content}], max_new_tokens=6, generate_kwargs={"do_sample": False}
        )
        for network in (model, ort_model)
    ]
    assert answers[0] == answers[1]


def test_images_must_be_followed_by_text(torch_model, ort_model):
    inputs = random_inputs(torch_model, [["text:2", "image:2"]])
    with pytest.raises(ValueError, match="must end with text"):
        ort_model.generate(**inputs, max_new_tokens=2)


def test_a_cache_of_another_model(torch_model, ort_model, inputs):
    cache = torch_model.compress(random_pixels(torch_model, 1), 2)
    other = VoCoCache(cache.keys, cache.values, cache.token_counts, {**cache.fingerprint, "weights": "0"})
    text = random_inputs(torch_model, [["image:2", "text:3"]])
    with pytest.raises(ValueError, match=r"made by another model.*weights is 0"):
        ort_model.generate(input_ids=text["input_ids"], voco_cache=other)


def test_what_the_graphs_lack(torch_model, ort_model, inputs):
    embeds = torch.zeros(1, 3, torch_model.config.text_config.hidden_size)
    with pytest.raises(ValueError, match="takes input_ids, not inputs_embeds"):
        ort_model.generate(inputs_embeds=embeds, max_new_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        ort_model.generate(**inputs, cache_implementation="static", max_new_tokens=2)
    filled = torch_model(**inputs, past_key_values=StaticCache(torch_model.config, max_cache_len=32)).past_key_values
    with pytest.raises(ValueError, match="must be a DynamicCache of 2 layers, got a StaticCache"):
        ort_model(input_ids=inputs["input_ids"][:, -1:], past_key_values=filled)
    with pytest.raises(ValueError, match="neither attentions nor hidden states"):
        ort_model(**inputs, output_hidden_states=True)
    for argument, message in (("labels", "compute no loss"), ("attention_mode", 'compute attention_mode="voco" only')):
        with pytest.raises(ValueError, match=message):
            ort_model(**inputs, **{argument: "causal"})
    with pytest.raises(TypeError, match=r"unexpected keyword arguments .'text_groups'"):
        ort_model(**inputs, text_groups=inputs["input_ids"])
    with pytest.raises(ValueError, match="runs on cpu"):
        ort_model.to("cuda")
