"""Images of any number of vision tokens, and the models of transformers that divide them into tiles."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import TILED, VOCO, pad_rows, random_images, tiny_config, tiny_model
from modeling.reference import (
    row_logits,
    short_batch,
    stock_features,
    stock_llava,
    uncompressed_row_logits,
)
from modeling.rows import layouts, logits_by_row, num_images

from voco_llama_hf import VoCoCache, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaModel
from voco_llama_hf.modeling.tiles_voco_llama import FRAME, UNDIVIDED
from voco_llama_hf.vision_tokens import count_vision_tokens


TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
MODELS = {kind: tiny_model(**overrides) for kind, overrides in TILED.items()}
LLAVAS = {kind: stock_llava(model) for kind, model in MODELS.items()}

random_batches = settings(max_examples=10, deadline=None, derandomize=True)
kinds = st.sampled_from(list(TILED))
# Any shape: wide, high, tiny, and larger than the grid
sizes = st.tuples(st.integers(1, 200), st.integers(1, 200))


@st.composite
def batches(draw):
    """Kind of model, rows, and images of random sizes."""
    kind, rows = draw(kinds), draw(layouts())
    shapes = draw(st.lists(sizes, min_size=num_images(rows), max_size=num_images(rows)))
    return kind, rows, random_images(MODELS[kind], shapes)


@random_batches
@given(batches(), st.sampled_from(["left", "right"]), st.booleans())
def test_both_ways_equal_the_dense_reference(drawn, padding_side, two_stages):
    kind, rows, images = drawn
    model, llava = MODELS[kind], LLAVAS[kind]
    batch = short_batch(rows, model.config, padding_side)
    with torch.no_grad():
        output = model(**batch, **images, use_cache=two_stages)
    for row, logits in zip(rows, logits_by_row(output, batch)):
        torch.testing.assert_close(logits, row_logits(model, llava, row, **images), **TOLERANCE)


@random_batches
@given(batches(), st.sampled_from(["left", "right"]))
def test_causal_mode_equals_the_dense_reference(drawn, padding_side):
    kind, rows, images = drawn
    model, batch = MODELS[kind], short_batch(rows, MODELS[kind].config, padding_side)
    with torch.no_grad():
        output = model(**batch, **images, attention_mode="causal")
    for row, logits in zip(rows, logits_by_row(output, batch)):
        expected = row_logits(model, LLAVAS[kind], row, causal=True, **images)
        torch.testing.assert_close(logits, expected, **TOLERANCE)


@random_batches
@given(batches(), st.sampled_from(["left", "right"]))
def test_uncompressed_mode_equals_the_class_of_transformers(drawn, padding_side):
    kind, rows, images = drawn
    model, batch = MODELS[kind], short_batch(rows, MODELS[kind].config, padding_side)
    with torch.no_grad():
        output = model(**batch, **images, attention_mode="uncompressed")
    for row, logits in zip(rows, logits_by_row(output, batch)):
        for ours, theirs in zip(logits, uncompressed_row_logits(model, LLAVAS[kind], row, **images)):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("size", [(28, 28), (100, 37), (31, 150), (1, 1), (2, 100)])
def test_greedy_tokens_uncompressed_are_those_of_transformers(kind, size):
    """One token after another by the scoring pass, against `generate` of transformers' own class."""
    model, llava, text = MODELS[kind], LLAVAS[kind], [5, 9, 30]
    images = random_images(model, [size])
    (features,) = stock_features(llava, **images)
    prompt = torch.tensor([[1, *[VOCO] * len(features), *text]])
    expected = llava.generate(prompt, **images, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :].tolist()
    answer: list[int] = []
    for _ in expected:
        ids = torch.tensor([[VOCO, *text, *answer]])
        logits = model(ids, **images, num_voco_tokens=1, attention_mode="uncompressed").logits
        answer.append(int(logits[0, -1].argmax()))
    assert answer == expected


@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_every_attention_gives_the_same(kind, attention):
    model = copy.deepcopy(MODELS[kind])
    images = random_images(model, [(40, 90), (28, 28), (84, 84)])
    batch = pad_rows([[20, VOCO, VOCO, 21], [VOCO, 22, VOCO, VOCO, 23]]) | {"num_voco_tokens": [2, 1, 2]}
    with torch.no_grad():
        expected = model(**batch, **images, use_cache=True).logits
        model.set_attn_implementation({"text_config": attention})
        logits = model(**batch, **images, use_cache=False).logits
    torch.testing.assert_close(
        logits[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()], **TOLERANCE
    )


@pytest.mark.parametrize("kind", TILED)
def test_both_ways_have_the_same_gradients(kind):
    images = random_images(MODELS[kind], [(40, 90), (28, 28), (84, 84)])
    batch = pad_rows([[20, VOCO, VOCO, 21, 22], [VOCO, 22, VOCO, VOCO, 23]]) | {"num_voco_tokens": [2, 1, 2]}
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == VOCO, -100)
    gradients = []
    for two_stages in (False, True):
        model = copy.deepcopy(MODELS[kind]).train()
        model(**batch, **images, labels=labels, two_stages=two_stages, use_cache=False).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "model.image_newline" in gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE)


@torch.no_grad()
@random_batches
@given(kinds, st.lists(sizes, min_size=2, max_size=6), st.integers(1, 3), st.integers(1, 4))
def test_an_image_is_the_same_alone_and_among_others(kind, shapes, k, batch_size):
    model = MODELS[kind]
    images = random_images(model, shapes)
    together = model.compress(**images, num_voco_tokens=k, batch_size=batch_size, show_progress=False)
    for index, entry in enumerate(together):
        alone = model.compress(**random_part(images, [index]), num_voco_tokens=k)
        torch.testing.assert_close(entry.keys, alone.keys, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entry.values, alone.values, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize(("batch_size", "most"), [(1, 10), (25, 20), (50, 50)])
def test_the_memory_of_compressing_is_bounded_in_tiles(kind, batch_size, most):
    """However many an image has; one image is compressed at least."""
    model = copy.deepcopy(MODELS[kind])
    images = random_images(model, [(84, 84)] * 5)
    assert images["pixel_values"].shape[:2] == (5, 10)
    tiles: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *call: tiles.append(len(call[-1].last_hidden_state)))
    model.compress(**images, num_voco_tokens=1, batch_size=batch_size, show_progress=False)
    assert max(tiles) == most and sum(tiles) == 50


def random_part(images: dict, chosen: list[int]) -> dict:
    return {name: tensor[chosen] for name, tensor in images.items()}


@torch.no_grad()
@pytest.mark.parametrize("kind", TILED)
def test_a_compressed_image_answers_as_its_pixels_do(kind, tmp_path):
    model = MODELS[kind]
    images = random_images(model, [(40, 90), (28, 28)])
    batch = pad_rows([[20, VOCO, VOCO, 21, 22], [VOCO, 22, 23]]) | {"num_voco_tokens": [2, 1]}
    expected = model.generate(**batch, **images, max_new_tokens=5)
    cache = model.compress(**images, num_voco_tokens=[2, 1])
    cache.save(tmp_path / "images.safetensors")
    loaded = VoCoCache.load(tmp_path / "images.safetensors")
    assert torch.equal(model.generate(**batch, voco_cache=loaded, max_new_tokens=5), expected)
    # A later turn repeats its history and brings one image more
    state = model.generate(**batch, **images, max_new_tokens=2, return_dict_in_generate=True)
    later = torch.cat([state.sequences, torch.tensor([[VOCO, 30], [VOCO, 31]])], dim=1)
    more = random_images(model, [(90, 40), (70, 70)], seed=1)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    everything = model.compress(**images, num_voco_tokens=[2, 1]), model.compress(**more, num_voco_tokens=1)
    ordered = VoCoCache.cat([everything[0][0], everything[1][0], everything[0][1], everything[1][1]])
    fresh = model.generate(input_ids=later, attention_mask=mask, voco_cache=ordered, max_new_tokens=4)
    going_on = model.generate(
        input_ids=later,
        attention_mask=mask,
        **more,
        num_voco_tokens=1,
        past_key_values=state.past_key_values,
        max_new_tokens=4,
    )
    assert torch.equal(going_on, fresh)


@torch.no_grad()
@pytest.mark.parametrize("kind", TILED)
def test_tiles_apart(kind):
    """Each tile is what an image of one tile is, and an entry of its own; equal tiles are equal entries."""
    model = MODELS[kind]
    images = random_images(model, [(28, 56), (84, 84)])
    images["pixel_values"][1, 3] = images["pixel_values"][0, 1]
    cache = model.compress(**images, num_voco_tokens_per_tile=2)
    assert cache.token_counts == [2] * (3 + 10)
    torch.testing.assert_close(cache[1].keys, cache[3 + 3].keys)
    single = {"pixel_values": images["pixel_values"][:1, 1], "image_sizes": torch.tensor([UNDIVIDED])}
    torch.testing.assert_close(cache[1].keys, model.compress(**single, num_voco_tokens=2).keys)
    (tokens,) = model.model.get_vision_features(**single)
    assert len(tokens) == 5  # a newline ends it
    prompt = {"input_ids": torch.tensor([[VOCO] * 2 * len(cache) + [20, 21]])}
    assert model.generate(**prompt, voco_cache=cache, max_new_tokens=3).shape == (1, 31)
    with pytest.raises(ValueError, match="takes the place of num_voco_tokens"):
        model.compress(**images, num_voco_tokens=1, num_voco_tokens_per_tile=2)


@torch.no_grad()
def test_frames_are_those_of_transformers():
    """A frame is a video of one frame; without sizes everything is."""
    for kind, model in MODELS.items():
        frames = torch.randn(3, 3, 28, 28)
        found = model.model.get_vision_features(frames)
        mixed = random_images(model, [(28, 56)])
        pixels = torch.cat([mixed["pixel_values"], torch.nn.functional.pad(frames[:1, None], (0,) * 7 + (2,))])
        sizes = torch.cat([mixed["image_sizes"], torch.tensor([FRAME])])
        large, frame = model.model.get_vision_features(pixels, sizes)
        torch.testing.assert_close(frame, found[0])
        torch.testing.assert_close(large, stock_features(LLAVAS[kind], **mixed)[0])
    theirs = LLAVAS["llava_onevision"].model.get_video_features(frames[:, None]).pooler_output
    torch.testing.assert_close(found, theirs)


@torch.no_grad()
@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("layer", [1, [1, -1]])
def test_features_are_those_of_transformers_whatever_a_call_asks_for(kind, layer):
    model, images = MODELS[kind], random_images(MODELS[kind], [(40, 90), (28, 28)])
    if isinstance(layer, list):
        model = tiny_model(**{**TILED[kind], "vision_feature_layer": layer})
        layer = None
    ours = model.get_image_features(**images, vision_feature_layer=layer, return_dict=True).pooler_output
    theirs = (
        stock_llava(model).get_image_features(**images, vision_feature_layer=layer, return_dict=True).pooler_output
    )
    for found, own, expected in zip(
        model.model.get_vision_features(**images, vision_feature_layer=layer), ours, theirs
    ):
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(found, expected)


@random_batches
@given(kinds, sizes)
def test_tokens_are_counted_without_a_model(kind, size):
    model = MODELS[kind]
    with torch.no_grad():
        (features,) = model.model.get_vision_features(**random_images(model, [size]))
    assert count_vision_tokens(model.config, size) == len(features)


def test_the_numbers_of_the_first_sentence_of_the_paper():
    """LLaVA-NeXT has five times 576 tokens of a large square image, and a newline a row."""
    config = VoCoLlamaConfig(base_model_type="llava_next")
    assert count_vision_tokens(config, (1000, 1000)) == count_vision_tokens(config) == 5 * 576 + 48
    assert count_vision_tokens(VoCoLlamaConfig()) == 576


@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("whole", [True, False], ids=["with head", "base"])
def test_saved_and_loaded(kind, whole, tmp_path):
    model = MODELS[kind]
    (model if whole else model.model).save_pretrained(tmp_path)
    loaded = (VoCoLlamaForConditionalGeneration if whole else VoCoLlamaModel).from_pretrained(tmp_path)
    expected = model.state_dict() if whole else model.model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
    assert loaded.config.image_grid_pinpoints == model.config.image_grid_pinpoints
    assert loaded.fingerprint() == model.fingerprint()
    assert type(copy.deepcopy(loaded)) is type(loaded)


@pytest.mark.parametrize("kind", TILED)
def test_a_new_model_has_a_newline(kind):
    """Initialised as in transformers, and where a checkpoint lacks it."""
    model = VoCoLlamaForConditionalGeneration(tiny_config(**TILED[kind]))
    assert 0.02 < model.model.image_newline.std() < 0.5


def test_the_grid_belongs_to_the_fingerprint():
    model = copy.deepcopy(MODELS["llava_next"])
    before = model.fingerprint()
    model.config.image_grid_pinpoints = [[28, 56], [56, 28]]
    assert model.fingerprint() != before
    model = copy.deepcopy(MODELS["llava_next"])
    with torch.no_grad():
        model.model.image_newline[0] += 0.01
    assert model.fingerprint() != before


def test_wrong_tiles_and_sizes_are_told():
    model = MODELS["llava_next"]
    images = random_images(model, [(28, 56), (84, 84)])
    pixels, shapes = images["pixel_values"], images["image_sizes"]
    filled = pixels.clone()
    filled[0, 5] = 1
    for wrong, message in (
        ({"pixel_values": pixels[:, :5], "image_sizes": shapes}, "has 5 tiles, but the model expects 10"),
        ({"pixel_values": filled, "image_sizes": shapes}, "more than the 3 tiles"),
        ({"pixel_values": pixels, "image_sizes": shapes[:1]}, "1 sizes, but there are 2 images"),
        ({"pixel_values": pixels, "image_sizes": torch.tensor([[0, 5], [1, 1]])}, "at least 1"),
        ({"pixel_values": pixels}, "with image_sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            model.compress(**wrong)
    with pytest.raises(ValueError, match="image_sizes"):
        tiny_model().compress(torch.zeros(1, 3, 28, 28), image_sizes=torch.tensor([[28, 28]]))


@pytest.mark.parametrize("grid", [[[30, 56]], [], [[28]], [[0, 28]], [["28", 28]], "28x28"])
def test_grids_that_do_not_fit_are_told(grid):
    with pytest.raises(Exception, match="image_grid_pinpoints"):
        tiny_config(**{**TILED["llava_next"], "image_grid_pinpoints": grid})
    with pytest.raises(Exception, match="image_grid_pinpoints"):
        tiny_config(image_grid_pinpoints=[[28, 56]])
