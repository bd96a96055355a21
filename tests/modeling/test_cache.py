"""VoCoCache: what it holds, what can be done with it, and what it refuses."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import random_inputs, random_pixels, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from voco_llama_hf import VoCoCache


MODEL = tiny_model()


@pytest.fixture(scope="module")
def cache() -> VoCoCache:
    return MODEL.compress(random_pixels(MODEL, 5), [1, 2, 3, 2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_size_is_exactly_the_keys_and_values_of_the_voco_tokens(k, dtype):
    model = tiny_model().to(dtype)
    cache = model.compress(random_pixels(model, 3).to(dtype), k)
    text = model.config.text_config
    per_image = 2 * text.num_hidden_layers * text.num_key_value_heads * k * text.head_dim * dtype.itemsize
    assert [entry.nbytes for entry in cache] == [per_image] * 3
    assert cache.nbytes == 3 * per_image
    assert cache.dtype == dtype and cache.num_voco_tokens == k and len(cache) == 3


def test_keys_are_those_of_a_plain_pass_at_positions_from_zero():
    """Reference: transformers' own Llama on the segment, with a dynamic cache."""
    from modeling.reference import stock_llava

    llava, pixels, k = stock_llava(MODEL), random_pixels(MODEL, 1), 3
    embed = llava.get_input_embeddings()
    vision = llava.model.get_image_features(pixel_values=pixels).pooler_output[0]
    segment = torch.cat([embed(torch.tensor([1])), vision, embed(torch.tensor([13] + [127] * k))])
    positions = torch.arange(len(segment)) - (len(segment) - k)
    with torch.no_grad():
        past = llava.model.language_model(
            inputs_embeds=segment[None], position_ids=positions[None], use_cache=True
        ).past_key_values
    cache = MODEL.compress(pixels, k)
    for layer, expected in enumerate(past.layers):
        torch.testing.assert_close(
            cache.keys[:, layer], expected.keys[0, :, -k:].transpose(0, 1), atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            cache.values[:, layer], expected.values[0, :, -k:].transpose(0, 1), atol=1e-4, rtol=1e-4
        )


def test_indexing_slicing_and_cat(cache):
    assert cache.num_voco_tokens == [1, 2, 3, 2, 1]
    assert cache[1].num_voco_tokens == 2 and cache[-1].token_counts == [1]
    torch.testing.assert_close(cache[1:4].keys, cache.keys[1:8])
    torch.testing.assert_close(cache[::2].values, torch.cat([cache[i].values for i in (0, 2, 4)]))
    picked = cache[[3, 0, 3]]
    assert picked.token_counts == [2, 1, 2]
    torch.testing.assert_close(picked.keys, torch.cat([cache[3].keys, cache[0].keys, cache[3].keys]))
    together = VoCoCache.cat(list(cache))
    assert together.token_counts == cache.token_counts
    torch.testing.assert_close(together.keys, cache.keys)
    assert len(cache[5:]) == 0 and cache[5:].nbytes == 0
    with pytest.raises(IndexError):
        cache[5]


def test_batches_do_not_change_the_result(cache):
    small = MODEL.compress(random_pixels(MODEL, 5), [1, 2, 3, 2, 1], batch_size=2, show_progress=False)
    torch.testing.assert_close(small.keys, cache.keys, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(small.values, cache.values, atol=1e-5, rtol=1e-4)


def test_progress_shows_above_one_batch(capsys):
    MODEL.compress(random_pixels(MODEL, 3), 1, batch_size=1)
    assert "Compressing images" in capsys.readouterr().err
    MODEL.compress(random_pixels(MODEL, 3), 1)
    assert "Compressing images" not in capsys.readouterr().err


def test_save_and_load(cache, tmp_path):
    path = tmp_path / "scenes.safetensors"
    cache[1:4].save(path)
    loaded = VoCoCache.load(path, cache.device)
    assert loaded.token_counts == [2, 3, 2] and loaded.fingerprint == cache.fingerprint
    assert torch.equal(loaded.keys, cache[1:4].keys) and torch.equal(loaded.values, cache[1:4].values)
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "voco_cache"


def test_an_interrupted_save_leaves_the_old_file(cache, tmp_path, monkeypatch):
    path = tmp_path / "scenes.safetensors"
    cache[0].save(path)
    before = path.read_bytes()

    def interrupt(tensors, filename, metadata):
        save_file(tensors, filename, metadata)
        raise KeyboardInterrupt

    monkeypatch.setattr("voco_llama_hf.modeling.cache_voco_llama.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_refused(cache, tmp_path):
    path = tmp_path / "scenes.safetensors"
    cache.save(path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-1], "not a readable safetensors file"),
        (whole[: len(whole) // 2], "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (b"not tensors at all", "not a readable safetensors file"),
        (whole[:-8] + bytes(8 * [7]), "does not match its checksum"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            VoCoCache.load(path)
    with pytest.raises(FileNotFoundError, match="missing"):
        VoCoCache.load(tmp_path / "missing.safetensors")


def test_other_safetensors_files_are_refused(cache, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"keys": torch.zeros(1), "values": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not one that VoCoCache\.save wrote"):
        VoCoCache.load(path)
    cache.save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata={**metadata, "version": "9"})
    with pytest.raises(ValueError, match="version 9"):
        VoCoCache.load(path)
    for counts in ([1], 3, ["a"]):
        save_file(load_file(path), path, metadata={**metadata, "num_voco_tokens": json.dumps(counts)})
        with pytest.raises(ValueError, match="is damaged"):
            VoCoCache.load(path)
    del metadata["fingerprint"]
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged"):
        VoCoCache.load(path)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (lambda: tiny_model(seed=1), "weights"),
        (lambda: tiny_model(text={"num_hidden_layers": 2}), "layers is 2, not 3"),
        (lambda: tiny_model(vision_suffix_token_ids=[13, 14]), "vision_suffix_token_ids"),
    ],
)
def test_a_cache_of_another_model_is_refused(other, difference):
    inputs = random_inputs(MODEL, [["image:1", "text:3"]])
    foreign = other().compress(inputs.pop("pixel_values"), 1)
    with pytest.raises(ValueError, match=difference):
        MODEL.generate(**inputs, voco_cache=foreign, max_new_tokens=2)
    with pytest.raises(ValueError, match=difference):
        MODEL(**inputs, voco_cache=foreign)
    with pytest.raises(ValueError, match=difference):
        VoCoCache.cat([MODEL.compress(random_pixels(MODEL, 1), 1), foreign])


def test_fingerprint_follows_the_weights_and_not_the_precision():
    model = tiny_model()
    before = model.fingerprint()
    assert model.fingerprint() == before == tiny_model().fingerprint()
    assert tiny_model().bfloat16().fingerprint() == before
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert model.fingerprint() != before


def test_a_cache_in_another_precision_still_answers():
    inputs = random_inputs(MODEL, [["text:2", "image:2", "text:3"]])
    cache = MODEL.compress(inputs["pixel_values"], 2)
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        exact = MODEL(**inputs, pixel_values=pixels).logits[:, 4:]
        rounded = MODEL(**inputs, voco_cache=cache.to(torch.bfloat16).to("cpu")).logits[:, 4:]
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_a_k_that_the_cache_does_not_have_is_refused(cache):
    inputs = random_inputs(MODEL, [["image:3", "text:3"]])
    inputs.pop("pixel_values")
    with pytest.raises(ValueError, match=r"3.*\[2\]|\[2\].*3"):
        MODEL.generate(**inputs, voco_cache=cache[1], max_new_tokens=1)


def test_the_token_behind_a_cached_image_cannot_be_scored(cache):
    inputs = random_inputs(MODEL, [["text:2", "image:1", "text:3"]])
    pixels = inputs.pop("pixel_values")
    entry, labels = MODEL.compress(pixels, 1), inputs["input_ids"].clone()
    with pytest.raises(ValueError, match="set their labels to -100"):
        MODEL(**inputs, voco_cache=entry, labels=labels)
    labels[:, 2:4] = -100
    with torch.no_grad():
        expected = MODEL(**inputs, pixel_values=pixels, labels=labels).loss
        torch.testing.assert_close(MODEL(**inputs, voco_cache=entry, labels=labels).loss, expected)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must share one dtype and one shape"):
        VoCoCache(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 4), [1], {})
    with pytest.raises(ValueError, match="cannot be divided"):
        VoCoCache(torch.zeros(3, 1, 1, 2), torch.zeros(3, 1, 1, 2), [1, 1], {})
    with pytest.raises(ValueError, match="at least one cache"):
        VoCoCache.cat([])
    with pytest.raises(StrictDataclassClassValidationError, match="at least 1"):
        tiny_config(num_voco_tokens=0)


def entries_equal(first: VoCoCache, second: VoCoCache) -> bool:
    return (
        first.token_counts == second.token_counts
        and torch.equal(first.keys, second.keys)
        and torch.equal(first.values, second.values)
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.one_of(st.none(), st.integers(1, 6))), max_size=12))
def test_append_is_cat_and_a_window_forgets_the_oldest(steps):
    """Frames of any k, any number at a time; views taken before stay as they were."""
    images = VoCoCache(torch.randn(15, 2, 2, 4), torch.randn(15, 2, 2, 4), [1, 2, 3, 4, 5], {"weights": "a"})
    stream = expected = images[:2]
    views = []
    stream = VoCoCache(stream.keys, stream.values, stream.token_counts, stream.fingerprint)
    for start, number, window in steps:
        new = images[start : start + number]
        stream.append(new, window=window)
        expected = VoCoCache.cat([expected, new])
        expected = expected if window is None else expected[-window:]
        assert entries_equal(stream, expected)
        views.append((stream[:], expected))
    assert all(entries_equal(view, before) for view, before in views)
    assert images.token_counts == [1, 2, 3, 4, 5]


def test_append_copies_what_is_held_ever_more_rarely():
    frame = VoCoCache(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4), [2], {})
    stream, windowed = frame[:], frame[:]
    places, windowed_places = set(), set()
    for _ in range(500):
        stream.append(frame)
        windowed.append(frame, window=100)
        places.add(stream.keys.untyped_storage().data_ptr())
        windowed_places.add(len(windowed.keys.untyped_storage()))
    assert len(stream) == 501 and len(places) <= 10
    assert len(windowed) == 100 and max(windowed_places) <= 4 * windowed.keys.nbytes


def test_a_stream_answers_at_any_time():
    """Reference: the frames it holds at that time, as pixels."""
    pixels = random_pixels(MODEL, 6)
    stream = MODEL.compress(pixels[:1], 2)
    for i in range(1, 6):
        stream.append(MODEL.compress(pixels[i : i + 1], 2), window=3)
        inputs = random_inputs(MODEL, [["text:2", *["image:2"] * len(stream), "text:3"]])
        held = pixels[max(0, i - 2) : i + 1]
        expected = MODEL.generate(**{**inputs, "pixel_values": held}, max_new_tokens=4)
        inputs.pop("pixel_values")
        assert torch.equal(MODEL.generate(**inputs, voco_cache=stream, max_new_tokens=4), expected)


def test_append_refuses_what_does_not_fit(cache):
    with pytest.raises(ValueError, match="made by another model"):
        cache[:].append(VoCoCache(cache.keys, cache.values, cache.token_counts, {"weights": "other"}))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        cache[:].append(cache, window=0)
