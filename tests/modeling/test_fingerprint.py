"""What the fingerprint of a model tells apart, and what it does not."""

import copy
import json
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from modeling.helpers import NEWLINE, VOCO, build_processor, random_inputs, random_pixels, tiny_model
from peft import LoraConfig, get_peft_model
from transformers.utils import logging

from voco_llama_hf import VoCoCache, VoCoLlamaForConditionalGeneration
from voco_llama_hf.modeling.cache_voco_llama import check_cache
from voco_llama_hf.modeling.fingerprint_voco_llama import check_fingerprint, with_images


LORA = {"target_modules": ["q_proj", "k_proj", "fc1", "linear_1", "up_proj"], "r": 2}


def compress(model) -> VoCoCache:
    base = tiny_model()
    return model.compress(random_pixels(base, 2), 2)


def randomize(model, seed: int = 0, only: str = "lora_") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def with_adapters(**options):
    model = get_peft_model(tiny_model(), LoraConfig(**{**LORA, **options}), "cats")
    model.add_adapter("dogs", LoraConfig(**{**LORA, **options}))
    randomize(model)
    return model.eval()


def keys_differ(first: VoCoCache, second: VoCoCache) -> bool:
    return not torch.allclose(first.keys, second.keys, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_copy_in_another_precision_is_equal(dtype):
    model, copied = tiny_model(), tiny_model().to(dtype)
    assert copied.fingerprint() == model.fingerprint() and model.fingerprint() == copied.fingerprint()
    check_fingerprint(model.fingerprint(), copied.fingerprint(), "the copy")
    check_fingerprint(copied.fingerprint(), model.fingerprint(), "the original")
    back = copied.to(torch.float32)
    assert (back.fingerprint() == model.fingerprint()) == (dtype == torch.float64)


def test_a_checkpoint_is_equal_in_every_precision_that_it_is_loaded_in(tmp_path):
    for stored in (torch.float16, torch.bfloat16):
        checkpoint = tiny_model().to(stored)
        with torch.no_grad():
            checkpoint.model.language_model.layers[0].mlp.up_proj.weight.view(-1)[:4] = 1e-6  # none of float16's
        checkpoint.save_pretrained(tmp_path)
        precisions = torch.float32, torch.bfloat16, torch.float16
        loaded = [VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype) for dtype in precisions]
        prints = [model.fingerprint() for model in [checkpoint, *loaded]]
        assert all(first == second for first in prints for second in prints)


def test_single_values_in_full_precision_are_told_apart():
    model, other = tiny_model(), tiny_model()
    weight = other.model.language_model.layers[1].self_attn.k_proj.weight
    weight.data[3, 5] = torch.nextafter(weight.data[3, 5], torch.tensor(9.0))
    assert model.fingerprint() != other.fingerprint()


def test_swapped_values_are_told_apart():
    model, other = tiny_model(), tiny_model()
    weight = other.model.language_model.layers[1].mlp.up_proj.weight
    weight.data[[0, 1]] = weight.data[[1, 0]]
    assert model.fingerprint() != other.fingerprint()


def test_what_keys_do_not_depend_on_does_not_count():
    model = tiny_model()
    before, cache = model.fingerprint(), compress(model)
    language = model.model.language_model
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        language.norm.weight.add_(1)
        language.layers[-1].mlp.up_proj.weight.add_(1)
        language.layers[-1].self_attn.q_proj.weight.add_(1)
        language.embed_tokens.weight[50] += 1
    model.resize_token_embeddings(200)
    model.config.num_voco_tokens, model.config.attention_mode = 5, "causal"
    assert model.fingerprint() == before
    assert not keys_differ(compress(model), cache)


@pytest.mark.parametrize("row", [VOCO, 1, NEWLINE])
def test_the_embeddings_of_a_segment_count(row):
    model = tiny_model()
    before = model.fingerprint()
    model.model.language_model.embed_tokens.weight.data[row, 7] += 0.01
    assert model.fingerprint(exact=False) != before and model.fingerprint() != before


@pytest.mark.parametrize("exact", [True, False])
def test_writes_that_pytorch_does_not_count_are_seen(exact):
    model = tiny_model()
    weight = model.model.language_model.layers[0].mlp.down_proj.weight
    seen = [model.fingerprint(exact)]
    weight.data.mul_(1.01)
    seen.append(model.fingerprint(exact))
    weight.data.copy_(torch.randn_like(weight))
    seen.append(model.fingerprint(exact))
    weight.data[5, 7] += 0.01
    seen.append(model.fingerprint(exact))
    weight.data = weight.data + 1
    seen.append(model.fingerprint(exact))
    weight.detach().numpy()[0] = 3
    seen.append(model.fingerprint(exact))
    assert not any(first == second for i, first in enumerate(seen) for second in seen[:i])


def test_questions_to_a_large_model_read_all_of_it_by_and_by():
    text = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 2}
    model = tiny_model(text=text)
    before = model.fingerprint()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    weight.data[639, 255] += 1
    asked = next(question for question in range(1000) if model.fingerprint(exact=False) != before)
    assert asked < 400
    embedding = model.model.language_model.embed_tokens.weight
    before = model.fingerprint()
    embedding.data[VOCO, 0] += 1
    assert model.fingerprint(exact=False) != before


@pytest.mark.parametrize("is_stream", [False, True])
def test_compress_without_reading_all_weights_notes_the_model_as_it_is(is_stream):
    model = tiny_model()
    pixels = random_pixels(model, 2)
    given = [pixels] if is_stream else pixels
    before = model.compress(given, 2, exact=False)
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.add_(1)
    after = model.compress(given, 2, exact=False)
    assert after.fingerprint == copy.deepcopy(model).fingerprint() != before.fingerprint


def test_a_changed_frequency_of_the_rotation_is_seen():
    model, before = tiny_model(), tiny_model().fingerprint()
    model.model.language_model.rotary_emb.inv_freq.data[2] *= 1.1
    assert model.fingerprint() != before
    assert tiny_model().half().fingerprint() == before


def test_configuration_in_words():
    model, other = tiny_model(), tiny_model(text={"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    with pytest.raises(ValueError, match=r"rope_parameters\.rope_theta is 500000\.0, not 10000\.0"):
        check_fingerprint(other.fingerprint(), model.fingerprint(), "this one")
    model.fingerprint()
    model.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match="vision_feature_layer is -2, not -1"):
        check_fingerprint(other.fingerprint(), model.fingerprint(exact=False), "this one")


def test_adapters_are_told_apart_and_named():
    model, plain = with_adapters(), tiny_model().fingerprint()
    cats, cats_cache = model.fingerprint(), compress(model)
    assert cats_cache.fingerprint == cats and cats != plain
    with pytest.raises(ValueError, match="adapter is cats, not none"):
        check_fingerprint(cats, plain, "this one")
    model.set_adapter("dogs")
    dogs = model.fingerprint(exact=False)
    assert keys_differ(compress(model), cats_cache)
    with pytest.raises(ValueError, match="adapter is cats, not dogs"):
        check_fingerprint(cats, dogs, "this one")
    with model.disable_adapter():
        assert model.fingerprint(exact=False) == plain
    assert model.fingerprint(exact=False) == dogs
    model.base_model.set_adapter(["cats", "dogs"])
    both = model.fingerprint()
    model.base_model.set_adapter(["dogs", "cats"])
    assert model.fingerprint() == both and both not in (cats, dogs, plain)
    model.set_adapter("cats")
    assert model.fingerprint() == cats


def test_the_scaling_of_an_adapter_counts():
    model = with_adapters()
    before = model.fingerprint()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("cats", 3)
    assert model.fingerprint(exact=False) != before


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_merged_adapters_are_weights(options):
    model = with_adapters(**options)
    unmerged = model.fingerprint()
    model.merge_adapter(["cats"])
    merged = model.fingerprint(exact=False)
    assert merged != unmerged
    assert model.merge_and_unload().fingerprint() == merged


def test_an_adapter_that_leaves_keys_alone_does_not_count():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["lm_head"], r=2))
    randomize(model)
    assert model.fingerprint() == tiny_model().fingerprint()


def test_modules_and_tokens_of_an_adapter_count():
    saved = get_peft_model(tiny_model(), LoraConfig(**LORA, modules_to_save=["multi_modal_projector"]))
    plain = tiny_model().fingerprint()
    before = saved.fingerprint()
    randomize(saved, only="multi_modal_projector.modules_to_save")
    assert saved.fingerprint() != before
    with saved.disable_adapter():
        assert saved.fingerprint() == plain
    tokens = get_peft_model(tiny_model(), LoraConfig(**LORA, trainable_token_indices={"embed_tokens": [VOCO]}))
    before = tokens.fingerprint()
    randomize(tokens, only="trainable_tokens")
    assert tokens.fingerprint() != before
    with tokens.disable_adapter():
        assert tokens.fingerprint() == plain


def offload_partly(model, folder):
    names = [f"model.language_model.layers.{layer}" for layer in range(3)]
    places = dict.fromkeys(["model.vision_tower", "model.multi_modal_projector", names[0], "lm_head"], "cpu")
    places |= {"model.language_model.embed_tokens": "disk", names[1]: "disk", names[2]: "cpu"}
    places |= {"model.language_model.norm": "cpu", "model.language_model.rotary_emb": "cpu"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize(
    "place",
    [
        offload_partly,
        lambda model, folder: disk_offload(model, folder, "cpu"),
        lambda model, folder: cpu_offload(model, "cpu"),
        lambda model, folder: cpu_offload(model, "cpu", offload_buffers=True),
        lambda model, folder: copy.deepcopy(model),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_are_equal_wherever_they_are(place, dtype, tmp_path):
    expected = tiny_model().to(dtype).fingerprint()
    placed = place(tiny_model().to(dtype), tmp_path)
    assert dict(placed.fingerprint()) == dict(expected)
    assert dict(placed.fingerprint()) == dict(expected)
    other = place(tiny_model(seed=1).to(dtype), tmp_path / "other")
    assert other.fingerprint() != expected
    changed = tiny_model().to(dtype)
    changed.model.language_model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert place(changed, tmp_path / "changed").fingerprint() != expected


def test_weights_that_are_nowhere_equal_nothing():
    with torch.device("meta"):
        model = tiny_model().to("meta")
    assert model.fingerprint()["weights"] == "none"
    assert model.fingerprint() != tiny_model().fingerprint()


def quantize_dynamically(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        language = model.model.language_model
        torch.ao.quantization.quantize_dynamic(language, {torch.nn.Linear}, torch.qint8, inplace=True)
    return model


def quantize_with_quanto(model):
    pytest.importorskip("optimum.quanto")
    from optimum.quanto import freeze, qint8, quantize

    quantize(model.model.language_model, weights=qint8)
    freeze(model)
    return model


class PackedLinear(torch.nn.Module):
    """Weights in integer buffers, as GPTQ and AWQ keep them."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.register_buffer("scales", linear.weight.abs().amax(1) / 127)
        self.register_buffer("qweight", (linear.weight / self.scales[:, None]).round().to(torch.int8))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states @ (self.qweight.to(states) * self.scales.to(states)[:, None]).T


def pack_into_buffers(model):
    for layer in model.model.language_model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    return model


@pytest.mark.parametrize("quantize", [quantize_dynamically, quantize_with_quanto, pack_into_buffers])
def test_packed_weights_are_told_apart(quantize):
    plain = tiny_model().fingerprint()
    first, again, other = (quantize(tiny_model(seed)).fingerprint() for seed in (0, 0, 1))
    assert first == again and first["quantization"] != "none" and plain["quantization"] == "none"
    with pytest.raises(ValueError, match="weights is"):
        check_fingerprint(other, first, "this one")
    with pytest.raises(ValueError, match="quantization is none, not"):
        check_fingerprint(plain, first, "this one")
    changed = tiny_model()
    changed.model.language_model.layers[0].mlp.up_proj.weight.data[3, 3] += 0.3
    assert quantize(changed).fingerprint() != first


def test_images_are_compared_where_both_say_how_they_were_made():
    processor, model = build_processor(), tiny_model()
    plain, noted = model.fingerprint(), with_images(model.fingerprint(), processor.image_processor)
    assert noted == plain == with_images(plain, copy.deepcopy(processor).image_processor)
    changed = copy.deepcopy(processor).image_processor
    changed.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match=r"image_mean is \[0\.1, 0\.2, 0\.3\], not"):
        check_fingerprint(with_images(plain, changed), noted, "this one")
    changed.do_normalize = False
    with pytest.raises(ValueError, match="do_normalize is True, not False"):
        check_fingerprint(noted, with_images(plain, changed), "this one")
    cache = compress(model)
    with_note = VoCoCache(cache.keys, cache.values, cache.token_counts, noted)
    assert "image_processor" in VoCoCache.cat([with_note, with_note]).fingerprint
    assert "image_processor" not in VoCoCache.cat([with_note, cache]).fingerprint


def test_caches_of_the_first_version_are_read_with_a_warning(tmp_path, caplog, monkeypatch):
    from safetensors.torch import save_file

    from voco_llama_hf.modeling.cache_voco_llama import digest

    model = tiny_model()
    cache, path = compress(model), tmp_path / "old.safetensors"
    names = ("text_model", "layers", "key_value_heads", "head_dim", "voco_token_id")
    names += ("vision_prefix_token_ids", "vision_suffix_token_ids")
    old = {**{name: cache.fingerprint[name] for name in names}, "weights": "a" * 64}
    save_file(
        {"keys": cache.keys, "values": cache.values},
        path,
        metadata={
            "format": "voco_cache",
            "version": "1",
            "num_voco_tokens": json.dumps(cache.token_counts),
            "fingerprint": json.dumps(old),
            "sha256": digest(cache.keys, cache.values),
        },
    )
    loaded = VoCoCache.load(path)
    assert torch.equal(loaded.keys, cache.keys) and loaded.fingerprint == old
    logging.get_logger("transformers").addHandler(caplog.handler)
    logger = logging.get_logger("voco_llama_hf.modeling.fingerprint_voco_llama")
    logger.addHandler(caplog.handler)
    check_cache(loaded, model.config, model.fingerprint())
    assert "cannot be checked" in caplog.text
    assert VoCoCache.cat([cache, loaded]).fingerprint.is_first_version
    with pytest.raises(ValueError, match="layers is 3, not 2"):
        check_cache(loaded, None, tiny_model(text={"num_hidden_layers": 2}).fingerprint())


def test_sound_caches():
    model = tiny_model()
    cache = compress(model)
    check_cache(cache, model.config, model.fingerprint(exact=False))
    with pytest.raises(ValueError, match="holds no image"):
        check_cache(cache[2:], model.config)
    broken = VoCoCache(cache.keys.clone(), cache.values, cache.token_counts, cache.fingerprint)
    check_cache(broken)
    broken.keys[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        check_cache(broken)
    with pytest.raises(ValueError, match=r"\(2, 2, 16\).*\(3, 2, 16\)"):
        check_cache(VoCoCache(cache.keys[:, :2], cache.values[:, :2], [2, 2], cache.fingerprint), model.config)
    with pytest.raises(ValueError, match="int64"):
        check_cache(VoCoCache(cache.keys.long(), cache.values.long(), [2, 2], cache.fingerprint))
    with pytest.raises(ValueError, match="1 to 576"):
        check_cache(VoCoCache(torch.zeros(600, 1, 1, 2), torch.zeros(600, 1, 1, 2), [600], {}))


def test_only_sound_caches_of_the_active_adapter_are_answered():
    model = with_adapters()
    inputs = random_inputs(tiny_model(), [["image:1", "text:3"]])
    cache = model.compress(inputs.pop("pixel_values"), 1)
    ask = {**inputs, "max_new_tokens": 1}
    answer = model.generate(**ask, voco_cache=cache)
    with model.disable_adapter(), pytest.raises(ValueError, match="adapter is cats, not none"):
        model.generate(**ask, voco_cache=cache)
    assert torch.equal(model.generate(**ask, voco_cache=cache), answer)
    cache.values[0, 1, 0, 3] = float("inf")
    for call in (model.generate, model.get_base_model()):
        with pytest.raises(ValueError, match="not finite"):
            call(**inputs, voco_cache=cache)


def test_a_copied_model_answers_for_itself():
    model = tiny_model()
    before = model.fingerprint()
    copied = copy.deepcopy(model)
    copied.model.language_model.layers[0].mlp.up_proj.weight.data += 1
    assert copied.fingerprint(exact=False) != before and model.fingerprint(exact=False) == before
    inputs = random_inputs(model, [["image:1", "text:3"]])
    cache = model.compress(inputs.pop("pixel_values"), 1)
    with pytest.raises(ValueError, match="made by another model"):
        copied.generate(**inputs, voco_cache=cache, max_new_tokens=1)
