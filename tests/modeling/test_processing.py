"""The processor: what an image costs, where a BOS token goes, and what does not fit."""

import inspect
import time
from typing import Unpack

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from modeling.helpers import build_processor
from PIL import Image
from transformers.image_utils import ImageInput
from transformers.video_utils import VideoInput

from voco_llama_hf import VoCoCache, VoCoLlamaProcessor


PROCESSOR = build_processor()
BOS, VOCO = PROCESSOR.tokenizer.bos_token_id, PROCESSOR.image_token_id
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def cache(*counts: int) -> VoCoCache:
    return VoCoCache(torch.zeros(sum(counts), 1, 1, 2), torch.zeros(sum(counts), 1, 1, 2), counts, {})


@pytest.mark.parametrize("k", [1, 2, 5])
def test_an_image_costs_k_tokens(k):
    with_image = PROCESSOR(images=IMAGE, text="a <image> b", num_voco_tokens=k, return_tensors="pt")
    assert (with_image["input_ids"] == VOCO).sum() == k
    assert with_image["num_voco_tokens"].tolist() == [k]
    assert with_image["pixel_values"].shape == (1, 3, 28, 28)
    assert with_image["input_ids"].shape == with_image["attention_mask"].shape


def test_one_number_an_image_and_rows_of_all_kinds():
    outputs = PROCESSOR(
        images=[IMAGE] * 4,
        text=["<image>\nwhat?", "no image", "one <image> two <image> three <image>"],
        num_voco_tokens=[3, 1, 2, 4],
        padding=True,
        return_tensors="pt",
    )
    assert (outputs["input_ids"] == VOCO).sum(-1).tolist() == [3, 0, 7]
    assert outputs["num_voco_tokens"].tolist() == [3, 1, 2, 4]


def test_a_text_that_starts_with_an_image_has_no_bos():
    """Whoever adds it: the tokenizer, a chat template, or nobody; other rows keep theirs."""
    texts = ["<image>\nwhat?", "what <image>?", "what?"]
    outputs = PROCESSOR(images=[IMAGE] * 2, text=texts, padding=True, padding_side="right", return_tensors="pt")
    assert outputs["input_ids"][:, 0].tolist() == [VOCO, BOS, BOS]
    assert PROCESSOR(images=IMAGE, text="<s><image>\nwhat?")["input_ids"][0][:2] != [BOS, VOCO]
    bare = PROCESSOR(images=IMAGE, text="what <image>?", add_special_tokens=False)["input_ids"][0]
    assert BOS not in bare


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_what_the_tokenizer_would_do(padding_side):
    texts = ["<image>\nwhat is this?", "<image>\nwhat?"]
    outputs = PROCESSOR(
        images=[IMAGE] * 2, text=texts, num_voco_tokens=2, padding=True, padding_side=padding_side, return_tensors="pt"
    )
    for ids, mask, text in zip(outputs["input_ids"], outputs["attention_mask"], texts):
        alone = PROCESSOR(images=IMAGE, text=text, num_voco_tokens=2, return_tensors="pt")
        assert ids[mask.bool()].tolist() == alone["input_ids"][0].tolist()
        assert alone["attention_mask"].all()
    # The longest row has no padding at all
    assert outputs["attention_mask"][0].all() and not outputs["attention_mask"][1].all()
    assert outputs["attention_mask"][1, 0 if padding_side == "right" else -1] == 1


def test_a_cache_stands_for_images():
    outputs = PROCESSOR(
        text=["<image>\nwhat?", "a <image>"], voco_cache=cache(2, 3), padding=True, return_tensors="pt"
    )
    assert set(outputs) == {"input_ids", "attention_mask", "num_voco_tokens"}
    assert (outputs["input_ids"] == VOCO).sum(-1).tolist() == [2, 3]
    pixels = PROCESSOR(
        images=[IMAGE] * 2,
        text=["<image>\nwhat?", "a <image>"],
        num_voco_tokens=[2, 3],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(outputs["input_ids"], pixels["input_ids"])
    assert torch.equal(outputs["num_voco_tokens"], pixels["num_voco_tokens"])


def test_a_chat_takes_images_and_caches():
    def chat(part: dict) -> list[dict]:
        return [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}]

    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    outputs = PROCESSOR.apply_chat_template(
        chat({"type": "image", "image": IMAGE}), **options, processor_kwargs={"num_voco_tokens": 3}
    )
    assert (outputs["input_ids"] == VOCO).sum() == 3 and outputs["input_ids"][0, 0] == BOS
    cached = PROCESSOR.apply_chat_template(
        chat({"type": "image"}), **options, processor_kwargs={"voco_cache": cache(3)}
    )
    assert torch.equal(cached["input_ids"], outputs["input_ids"]) and "pixel_values" not in cached


def test_assistant_masks_survive_the_expansion_of_images():
    chat = [
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    outputs = PROCESSOR.apply_chat_template(
        chat,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"num_voco_tokens": 4},
    )
    answer = outputs["input_ids"][0][outputs["assistant_masks"][0].bool()]
    assert PROCESSOR.tokenizer.decode(answer).strip() == "a cat"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "<image> what?"}, "no images were passed"),
        ({"text": "what?", "images": IMAGE}, "0 <image> tokens, but 1 images"),
        ({"text": "<image> <image>", "images": IMAGE}, "2 <image> tokens, but 1 images"),
        ({"text": "<voco> what?", "images": IMAGE}, "write <image>"),
        ({"text": "<image>", "images": IMAGE, "num_voco_tokens": 0}, "at least 1"),
        ({"text": "<image>", "images": IMAGE, "num_voco_tokens": 10_000}, "at most 576"),
        ({"text": "<image>", "images": IMAGE, "num_voco_tokens": [1, 2]}, "2 numbers, but there are 1 images"),
        ({"text": "<image> <image>", "voco_cache": cache(1)}, "2 <image> tokens, but the voco_cache has 1 images"),
        ({"text": "<image>", "voco_cache": cache(2), "num_voco_tokens": 1}, r"num_voco_tokens=1.*\[2\]"),
        ({"text": "<image>", "voco_cache": cache(2), "images": IMAGE}, "not both"),
        ({"text": "what? <image>", "images": IMAGE, "max_length": 2, "truncation": True}, "truncation"),
        ({"text": ["<image>", 3], "images": IMAGE}, "must be a string or list of strings"),
    ],
)
def test_what_does_not_fit_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        PROCESSOR(**arguments)


def test_a_tokenizer_without_the_voco_token_is_refused():
    tokenizer = build_processor().tokenizer
    with pytest.raises(ValueError, match="has no <compressed> token"):
        VoCoLlamaProcessor(PROCESSOR.image_processor, tokenizer, voco_token="<compressed>")


def test_save_and_load(tmp_path):
    processor = build_processor()
    processor.num_voco_tokens = 2
    processor.save_pretrained(tmp_path)
    loaded = VoCoLlamaProcessor.from_pretrained(tmp_path)
    assert loaded.num_voco_tokens == 2 and loaded.chat_template == processor.chat_template
    outputs = loaded(images=IMAGE, text="<image> what?", return_tensors="pt")
    assert outputs["num_voco_tokens"].tolist() == [2]


def test_batch_decode_leaves_voco_tokens_out():
    ids = PROCESSOR(images=IMAGE, text="<image>what?", num_voco_tokens=3)["input_ids"]
    assert PROCESSOR.batch_decode(ids, skip_special_tokens=True) == ["what?"]


def test_the_counts_can_be_left_out():
    """Trainers hand what a processor returns on to functions of fixed arguments."""
    processor = build_processor()
    processor.return_num_voco_tokens = False
    inputs = {"images": [IMAGE, IMAGE], "text": ["<image>a", "<image>b"], "return_tensors": "pt"}
    outputs = processor(**inputs, num_voco_tokens=2)
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(outputs) <= set(processor.model_input_names)
    assert "num_voco_tokens" in processor(**inputs, return_num_voco_tokens=True)
    assert "num_voco_tokens" not in PROCESSOR(**inputs, return_num_voco_tokens=False)
    with pytest.raises(ValueError, match=r"the same number of VoCo tokens, got \[1, 2\]"):
        processor(images=[IMAGE] * 2, text="<image><image>", num_voco_tokens=[1, 2])


def test_what_a_call_takes_can_be_read():
    """As transformers' common tests and engines read it."""
    parameters = inspect.signature(VoCoLlamaProcessor.__call__).parameters
    assert parameters["images"].annotation == ImageInput | None
    assert parameters["videos"].annotation == VideoInput | None
    assert parameters["kwargs"].annotation == Unpack[VoCoLlamaProcessor.valid_processor_kwargs]
    sizes = [(480, 640), (10, 20)]
    data = PROCESSOR._get_num_multimodal_tokens(image_sizes=sizes, num_voco_tokens=3)
    assert data["num_image_tokens"] == [3, 3] and data["num_image_patches"] == [1, 1]
    assert PROCESSOR._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [1, 1]
    assert "num_image_tokens" not in PROCESSOR._get_num_multimodal_tokens()
    types = PROCESSOR(images=IMAGE, text="a<image>", num_voco_tokens=2, return_mm_token_type_ids=True)
    assert types["mm_token_type_ids"] == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": "max_length", "max_length": 9, "padding_side": "right", "size": {"height": 14, "width": 14}},
        {
            "text_kwargs": {"padding": "max_length", "max_length": 9, "padding_side": "right"},
            "images_kwargs": {"size": {"height": 14, "width": 14}},
        },
    ],
)
def test_keyword_arguments_are_flat_or_by_modality(arguments):
    common = {"common_kwargs": {"return_tensors": "np"}}
    outputs = PROCESSOR(images=IMAGE, text="<image>what?", **arguments, **common)
    assert outputs["pixel_values"].shape == (1, 3, 14, 14) and isinstance(outputs["input_ids"], np.ndarray)
    assert outputs["attention_mask"].tolist() == [[1] * 6 + [0] * 3]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"padding": True, "text_kwargs": {"padding": False}}, ValueError, "padding is passed twice"),
        (
            {"num_voco_tokens": 2, "images_kwargs": {"num_voco_tokens": 2}},
            ValueError,
            "num_voco_tokens is passed twice",
        ),
        ({"num_voco_tokens": "2"}, StrictDataclassFieldValidationError, "num_voco_tokens"),
        ({"padding": "all"}, ValueError, "all is not a valid PaddingStrategy"),
        ({"audio": np.zeros(10)}, ValueError, "no audio"),
    ],
)
def test_keyword_arguments_that_make_no_sense(arguments, error, message):
    with pytest.raises(error, match=message):
        PROCESSOR(images=IMAGE, text="<image>", **arguments)


def test_every_token_has_its_offsets():
    """Whatever is padded where, and whoever wrote the BOS token."""
    texts = ["<image>what is this?", "say <image>b", "<s><image>c"]
    outputs = PROCESSOR(
        images=[IMAGE] * 3,
        text=texts,
        num_voco_tokens=2,
        padding=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_text_replacement_offsets=True,
    )
    tokenizer = PROCESSOR.tokenizer
    assert (
        len({len(row) for name in outputs if name.endswith(("ids", "mask", "mapping")) for row in outputs[name]}) == 1
    )
    for text, ids, spans, replaced in zip(
        texts, outputs["input_ids"], outputs["offset_mapping"], outputs["text_replacement_offsets"]
    ):
        [image] = replaced
        assert text[slice(*image["span"])] == "<image>" and image["replacement"] == "<voco><voco>"
        end_of_image, behind = image["new_span"][1], text[image["span"][1] :]
        for token, (start, end) in zip(ids, spans):
            if end > end_of_image:
                assert tokenizer.decode([token]) == behind[start - end_of_image : end - end_of_image]


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_assistant_masks_of_a_padded_batch(bos, padding_side):
    """With an image in front, where the BOS token is taken off."""
    template = bos + (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{% endgeneration %}{% else %}{% for part in message['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
    )
    chats = [
        [
            {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        ]
        for question, answer in (("what?", "a cat"), ("what is this, and why?", "dogs"))
    ]
    outputs = PROCESSOR.apply_chat_template(
        chats,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"num_voco_tokens": 3, "padding": True, "padding_side": padding_side},
    )
    answers = [ids[mask.bool()] for ids, mask in zip(outputs["input_ids"], outputs["assistant_masks"])]
    assert PROCESSOR.batch_decode(answers) == ["a cat", "dogs"]
    assert (outputs["input_ids"] == VOCO).sum(-1).tolist() == [3, 3]


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content']['missing']['missing'] }}",
        "{{ 1 + 'a' }}",
        "{{ 1 // 0 }}",
        "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
        "{% include 'secret' %}",
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_a_chat_template_that_fails_is_a_value_error(template, tokenize):
    chat = [{"role": "user", "content": [{"type": "image", "image": IMAGE}]}]
    with pytest.raises(ValueError, match="the chat template fails on this conversation"):
        PROCESSOR.apply_chat_template(chat, chat_template=template, tokenize=tokenize, return_dict=tokenize)


def test_other_errors_in_a_chat_are_not_the_templates():
    chat = [{"role": "user", "content": [{"type": "image", "path": "missing.png"}]}]
    with pytest.raises(ValueError, match=r"missing\.png is not an image"):
        PROCESSOR.apply_chat_template(chat, tokenize=True, return_dict=True)


@pytest.mark.skipif(
    "sanitize_control_tokens" not in inspect.signature(VoCoLlamaProcessor.__base__.apply_chat_template).parameters,
    reason="newer than this transformers",
)
def test_tokens_that_a_user_wrote_are_text():
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "and <voco>?"}]
    outputs = PROCESSOR.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert outputs["input_ids"][0].count(VOCO) == 1
    assert PROCESSOR.decode(outputs["input_ids"][0]).endswith("and <voco>?")


def test_long_texts_take_little_longer_than_their_tokens():
    """Counting tokens one by one in a tensor took longer than everything else."""
    text = "say <image>" + "a b" * 100_000
    start = time.perf_counter()
    PROCESSOR.tokenizer(text, return_tensors="pt")
    alone = time.perf_counter() - start
    start = time.perf_counter()
    PROCESSOR(images=IMAGE, text=text, return_tensors="pt")
    assert time.perf_counter() - start < 3 * alone + 1
