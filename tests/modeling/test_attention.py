"""The attention rule: one result whichever way it is computed, and the result that the paper's equations ask for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import tiny_config, tiny_model
from modeling.reference import Image, row_logits, short_batch, stock_llava, uncompressed_row_logits
from modeling.rows import layouts, logits_by_row, num_images
from transformers import DynamicCache, LlamaConfig, MistralConfig

from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaModel
from voco_llama_hf.modeling.layout_voco_llama import VoCoRuns, find_starts, resolve_num_voco_tokens


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MODEL = tiny_model()
LLAVA = stock_llava(MODEL)
SIZE = MODEL.config.vision_config.image_size


def pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return torch.randn(num_images, 3, SIZE, SIZE, generator=generator)


random_layouts = settings(max_examples=20, deadline=None, derandomize=True)


@random_layouts
@given(layouts(), st.sampled_from(["left", "right"]), st.booleans())
def test_both_ways_equal_the_dense_reference(rows, padding_side, two_stages):
    batch, images = short_batch(rows, MODEL.config, padding_side), pixels(num_images(rows))
    with torch.no_grad():
        output = MODEL(**batch, pixel_values=images, use_cache=two_stages)
    assert (output.past_key_values is not None) == two_stages
    for row, logits in zip(rows, logits_by_row(output, batch)):
        torch.testing.assert_close(logits, row_logits(MODEL, LLAVA, row, images), **TOLERANCE)


@random_layouts
@given(layouts(), st.sampled_from(["left", "right"]))
def test_causal_mode_equals_the_dense_reference(rows, padding_side):
    batch, images = short_batch(rows, MODEL.config, padding_side), pixels(num_images(rows))
    with torch.no_grad():
        output = MODEL(**batch, pixel_values=images, attention_mode="causal")
    for row, logits in zip(rows, logits_by_row(output, batch)):
        torch.testing.assert_close(logits, row_logits(MODEL, LLAVA, row, images, causal=True), **TOLERANCE)


@random_layouts
@given(layouts(), st.sampled_from(["left", "right"]))
def test_uncompressed_mode_equals_llava(rows, padding_side):
    batch, images = short_batch(rows, MODEL.config, padding_side), pixels(num_images(rows))
    with torch.no_grad():
        output = MODEL(**batch, pixel_values=images, attention_mode="uncompressed")
    for row, logits in zip(rows, logits_by_row(output, batch)):
        for ours, theirs in zip(logits, uncompressed_row_logits(MODEL, LLAVA, row, images)):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, **TOLERANCE)


@random_layouts
@given(
    layouts(),
    st.lists(st.lists(st.integers(14, 120), min_size=1, max_size=4), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from([("voco", False), ("voco", True), ("causal", False), ("uncompressed", False)]),
)
def test_text_groups_are_read_as_if_each_were_alone(rows, questions, padding_side, way):
    """Every row asks all questions; the reference is a batch of one question, for each of them."""
    mode, two_stages = way
    images = pixels(num_images(rows))
    together = short_batch([[*row, *questions] for row in rows], MODEL.config, padding_side)
    lengths = [0, *map(len, questions)]
    numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    groups = torch.zeros_like(together["input_ids"])
    for row_groups, mask in zip(groups, together["attention_mask"]):
        row_groups[mask.nonzero().flatten()[-len(numbers) :]] = numbers
    with torch.no_grad():
        output = MODEL(
            **together,
            pixel_values=images,
            attention_mode=mode,
            text_groups=groups,
            two_stages=two_stages,
            use_cache=False,
        ).logits
    for number, question in enumerate(questions, start=1):
        alone = short_batch([[*row, question] for row in rows], MODEL.config, padding_side)
        with torch.no_grad():
            expected = MODEL(**alone, pixel_values=images, attention_mode=mode, use_cache=False)
        for ours, its_groups, theirs in zip(output, groups, logits_by_row(expected, alone)):
            torch.testing.assert_close(ours[its_groups == number], theirs[-len(question) :], **TOLERANCE)


def test_two_stages_under_autocast():
    """Keys and values have data types of their own there."""
    rows = [[[20, 21], Image(0, 2), [22, 23]], [Image(1, 1), [24]]]
    batch, images = short_batch(rows, MODEL.config, "right"), pixels(2)
    with torch.no_grad(), torch.autocast(torch.get_default_device().type, torch.bfloat16):
        single, stages = (MODEL(**batch, pixel_values=images, use_cache=cache).logits for cache in (False, True))
        groups = torch.ones_like(batch["input_ids"]).masked_fill(batch["input_ids"] == MODEL.config.voco_token_id, 0)
        grouped = MODEL(**batch, pixel_values=images, text_groups=groups, two_stages=True, use_cache=False).logits
        cached = MODEL(**batch, voco_cache=MODEL.compress(images, [2, 1])).logits
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(stages[mask], single[mask], atol=0.05, rtol=0.05)
    is_text = mask & (groups == 1)
    torch.testing.assert_close(cached[is_text], stages[is_text], atol=0.05, rtol=0.05)
    assert grouped.isfinite().all()


def test_text_groups_of_images_that_are_compressed_already():
    ids, groups = torch.tensor([[127, 20, 21]]), torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        expected = MODEL(input_ids=ids, pixel_values=pixels(1), text_groups=groups, use_cache=False).logits
        output = MODEL(input_ids=ids, voco_cache=MODEL.compress(pixels(1), 1), text_groups=groups).logits
    torch.testing.assert_close(output[:, 1:], expected[:, 1:], **TOLERANCE)


def test_ways_that_cannot_be_combined():
    ids, groups = torch.tensor([[127, 20, 21]]), torch.tensor([[0, 1, 2]])
    with pytest.raises(ValueError, match="text_groups needs images, no past_key_values"):
        MODEL(input_ids=ids[:, 1:], text_groups=groups[:, 1:])
    with torch.no_grad():
        cache = MODEL(input_ids=ids, pixel_values=pixels(1), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="text_groups needs images, no past_key_values"):
        MODEL(input_ids=ids, pixel_values=pixels(1), text_groups=groups, past_key_values=cache)
    with pytest.raises(ValueError, match="two_stages=False needs use_cache=False"):
        MODEL(input_ids=ids, pixel_values=pixels(1), two_stages=False, use_cache=True)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(layouts(), st.sampled_from(["left", "right"]))
def test_eager_attention_equals_sdpa(rows, padding_side):
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    batch, images = short_batch(rows, MODEL.config, padding_side), pixels(num_images(rows))
    for use_cache in (False, True):
        with torch.no_grad():
            expected = MODEL(**batch, pixel_values=images, use_cache=use_cache)
            output = eager(**batch, pixel_values=images, use_cache=use_cache)
        for ours, theirs in zip(logits_by_row(output, batch), logits_by_row(expected, batch)):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_flex_attention_equals_sdpa(padding_side):
    torch._dynamo.reset()  # of dynamic shapes, which other tests have led to, inductor makes C++ that is none
    # Heads of 16, the smallest that flex_attention compiles for
    flex, sdpa = tiny_model(), tiny_model()
    flex.set_attn_implementation({"text_config": "flex_attention"})
    rows = [[[20, 21], Image(0, 2), [22], Image(1, 1), [23, 24, 25]], [Image(2, 3), [26]], [[27, 28]]]
    batch, images = short_batch(rows, sdpa.config, padding_side), pixels(3)
    with torch.no_grad():
        expected = sdpa(**batch, pixel_values=images, use_cache=False)
        output = flex(**batch, pixel_values=images, use_cache=False)
    for ours, theirs in zip(logits_by_row(output, batch), logits_by_row(expected, batch)):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_an_image_is_compressed_without_its_surroundings():
    """The keys and values of an image do not depend on the prompt, the row or the other images."""
    images = pixels(3)
    alone = MODEL.compress(images[1:2], 2)
    among = MODEL.compress(images, [4, 2, 1])[1]
    torch.testing.assert_close(alone.keys, among.keys)
    torch.testing.assert_close(alone.values, among.values)


def test_text_cannot_read_what_the_voco_tokens_did_not_keep():
    """With keys and values of the VoCo tokens fixed, nothing else of the image reaches the text."""
    images = pixels(2)
    cache = MODEL.compress(images, 1)
    rows = [[[20, 21, 22], Image(0, 1), [23, 24]]]
    batch = short_batch(rows, MODEL.config, "left")
    with torch.no_grad():
        first = MODEL(**batch, voco_cache=cache[0]).logits
        # The same entry under the hood of another image: values and keys decide, not pixels
        again = MODEL(**batch, pixel_values=images[:1]).logits
        other = MODEL(**batch, voco_cache=cache[1]).logits
    torch.testing.assert_close(first[:, 4:], again[:, 4:], **TOLERANCE)
    assert (first[:, 4:] - other[:, 4:]).abs().max() > 1e-3
    torch.testing.assert_close(first[:, :3], other[:, :3])


def test_gradient_checkpointing_gives_the_same_loss_and_gradients():
    rows = [[[20, 21], Image(0, 2), [22, 23]], [Image(1, 1), [24]]]
    batch, images = short_batch(rows, MODEL.config, "right"), pixels(2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients, losses = [], []
    for checkpointing, use_cache in ((False, False), (True, True), (False, True)):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**batch, pixel_values=images, labels=labels, use_cache=use_cache).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], **TOLERANCE)
        torch.testing.assert_close(gradient, gradients[2][name], **TOLERANCE)


@pytest.mark.parametrize("window", [3, 6])
def test_a_sliding_window_counts_compact_positions(window):
    """Both ways agree under a sliding window, in which an image takes k places."""
    model = tiny_model(text_class=MistralConfig, text={"sliding_window": window})
    # Keys of a segment go V deep, which compression sees through the same window
    rows = [[[20, 21, 22], Image(0, 2), [23, 24, 25, 26]], [Image(1, 1), [27, 28]]]
    batch, images = short_batch(rows, model.config, "left"), pixels(2)
    with torch.no_grad():
        single = model(**batch, pixel_values=images, use_cache=False)
        staged = model(**batch, pixel_values=images, past_key_values=DynamicCache(config=model.config.text_config))
        unlimited = tiny_model(text_class=MistralConfig, text={"sliding_window": None})(
            **batch, pixel_values=images, use_cache=False
        )
    for ours, theirs in zip(logits_by_row(single, batch), logits_by_row(staged, batch)):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert (single.logits - unlimited.logits).abs().max() > 1e-3


def test_attention_implementations_without_custom_masks_compute_in_two_stages():
    """Flash attention takes no mask of ours, and plain causal stages need none."""
    model = tiny_model()
    calls = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    rows = [[[20], Image(0, 2), [21]]]
    batch = short_batch(rows, model.config, "left")
    model.compress(pixels(1))  # looks at the text model once
    calls.clear()
    with torch.no_grad():
        expected = model(**batch, pixel_values=pixels(1), use_cache=False)
        assert len(calls) == 1 and calls[0]["attention_mask"].ndim == 4
        calls.clear()
        model.config.text_config._attn_implementation = "flash_attention_2"
        try:
            assert model.model._runs_in_two_stages(None, "voco", False, None)
        finally:
            model.config.text_config._attn_implementation = "sdpa"
        staged = model(**batch, pixel_values=pixels(1), use_cache=True)
    # Neither stage is handed a mask of its own: what flash attention can compute
    assert len(calls) == 2
    assert calls[0].get("attention_mask") is None and calls[1]["attention_mask"].ndim == 2
    torch.testing.assert_close(staged.logits, expected.logits, **TOLERANCE)


def test_hidden_states_are_those_of_the_short_sequence():
    rows = [[[20, 21], Image(0, 2), [22, 23]]]
    batch = short_batch(rows, MODEL.config, "left")
    with torch.no_grad():
        output = MODEL(**batch, pixel_values=pixels(1), use_cache=False, output_hidden_states=True)
        staged = MODEL(**batch, pixel_values=pixels(1), use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == MODEL.config.text_config.num_hidden_layers + 1
    text = [0, 1, 4, 5]
    for single, two in zip(output.hidden_states, staged.hidden_states):
        assert single.shape == two.shape == (1, 6, MODEL.config.text_config.hidden_size)
        torch.testing.assert_close(single[:, text], two[:, text], **TOLERANCE)


@pytest.mark.parametrize(
    ("counts", "images", "tokens", "message"),
    [
        (None, 2, 3, "3 <voco> tokens for 2 images"),
        (None, 1, 0, "0 <voco> tokens for 1 images"),
        (2, 2, 3, "need 4 <voco> tokens, but the input has 3"),
        ([1, 2], 3, 3, "2 numbers, but there are 3 images"),
        ([0, 3], 2, 3, "at least 1"),
    ],
)
def test_counts_that_do_not_fit_are_named(counts, images, tokens, message):
    with pytest.raises(ValueError, match=message):
        resolve_num_voco_tokens(counts, images, tokens)


def test_voco_tokens_torn_apart_are_an_error():
    with pytest.raises(ValueError, match="image 0 is torn apart"):
        MODEL(input_ids=torch.tensor([[127, 20, 127]]), pixel_values=pixels(1), num_voco_tokens=2)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3), st.data())
def test_torn_images_are_told_from_whole_ones(rows, data):
    """On the host and on the device, against a walk over every image's tokens."""
    tokens = [(row, column) for row, is_voco in enumerate(rows) for column in range(6) if is_voco[column]]
    counts = []
    while sum(counts) < len(tokens):
        counts.append(data.draw(st.integers(1, len(tokens) - sum(counts))))
    images = [tokens[sum(counts[:i]) : sum(counts[: i + 1])] for i in range(len(counts))]
    torn = [
        i
        for i, ((row, column), *rest) in enumerate(images)
        if rest != [(row, column + n + 1) for n in range(len(rest))]
    ]
    mask = torch.tensor(rows)
    for find in (lambda: find_starts(mask.cpu().numpy(), counts), lambda: VoCoRuns.find(mask, counts).starts):
        if torn:
            with pytest.raises(ValueError, match=f"image {torn[0]} is torn apart"):
                find()
        else:
            assert find().tolist() == [image[0][1] for image in images]


def test_modes_other_than_voco_take_no_cache():
    cache = MODEL.compress(pixels(1), 1)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration"):
        MODEL(input_ids=torch.tensor([[127, 20]]), voco_cache=cache, attention_mode="causal")
    with pytest.raises(ValueError, match="attention_mode must be one of"):
        MODEL(input_ids=torch.tensor([[127, 20]]), pixel_values=pixels(1), attention_mode="bidirectional")


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "changes with the length"),
        ({"full_attention": {"rope_type": "default", "rope_theta": 1e4}}, "one rotary embedding for all layers"),
    ],
)
def test_positions_that_cannot_be_moved_are_refused(rope, message):
    config = tiny_config()
    config.text_config.rope_parameters = rope
    with pytest.raises(ValueError, match=message):
        VoCoLlamaModel(config)


def test_learned_positions_are_refused():
    with pytest.raises(ValueError, match="rotary position embeddings"):
        VoCoLlamaModel(VoCoLlamaConfig(text_config={"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2}))


def test_positions_do_not_grow_with_the_vision_tokens():
    """Thousands of frames fit in a context window of VoCo tokens alone."""
    config = tiny_config()
    assert isinstance(config.text_config, LlamaConfig)
    seen = []
    model = tiny_model()
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    rows = [[Image(n, 1) for n in range(20)] + [[20, 21]]]
    batch = short_batch(rows, config, "left")
    with torch.no_grad():
        model(**batch, pixel_values=pixels(20), use_cache=False)
    assert seen[0].max() == 21
    assert np.all(seen[0].min().item() < 0)
