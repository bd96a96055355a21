"""The processor: what an image costs, where a BOS token goes, and what does not fit."""

import numpy as np
import pytest
import torch
from modeling.helpers import build_processor
from PIL import Image

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
