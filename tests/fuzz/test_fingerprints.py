"""Fingerprints beside the keys themselves: where keys differ fingerprints do, and equal models are never refused."""

import copy
import random
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from modeling.helpers import NEWLINE, VOCO, random_pixels, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedConfig, SiglipVisionConfig

from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.modeling.fingerprint_voco_llama import check_fingerprint


PIXELS = random_pixels(tiny_model(), 1)
OTHER_STRINGS = {
    "hidden_act": ("gelu", "relu"),
    "projector_hidden_act": ("relu", "silu"),
    "vision_feature_select_strategy": ("full",),
    "attention_mode": ("causal",),
}
ROPES = (
    {"rope_type": "default", "rope_theta": 500_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 256},
    {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
)
# Of a text model, of no use without each other or not a setting
NOT_SETTINGS = {
    "model_type",
    "transformers_version",
    "auto_map",
    "id2label",
    "label2id",
    "vision_config",
    "text_config",
}


def keys_of(model: Any) -> torch.Tensor:
    return model.compress(PIXELS, 2, show_progress=False).keys


def other_values(name: str, value: Any) -> list[Any]:
    if name == "rope_parameters":
        return list(ROPES)
    if name in OTHER_STRINGS:
        return [other for other in OTHER_STRINGS[name] if other != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value * 2, value - 1] if value > 1 else [value + 1]
    if isinstance(value, float):
        return [value * 100 + 0.01]
    if isinstance(value, list):
        return [[*value, 5], []]
    return []


def changed_configs(config: Any, seed_part: str = "") -> list[tuple[str, Any]]:
    """Every field of a configuration and of those in it, each changed alone."""
    part: PreTrainedConfig = config if not seed_part else getattr(config, seed_part)
    changed = []
    for name, value in vars(part).items():
        if name.startswith("_") or name in NOT_SETTINGS:
            continue
        for other in other_values(name, value):
            copied = copy.deepcopy(config)
            try:
                setattr(copied if not seed_part else getattr(copied, seed_part), name, other)
            except Exception:  # strict configurations refuse some values
                continue
            changed.append((f"{seed_part}.{name}={other}", copied))
    return changed


def build(config: Any, weights: dict[str, torch.Tensor]) -> Any:
    """The same weights under another configuration; None where they do not fit it."""
    try:
        model = VoCoLlamaForConditionalGeneration(config).eval()
        model.load_state_dict(weights)
        keys_of(model)
    except Exception:
        return None
    return model


@pytest.mark.parametrize("vision", [{}, {"vision_class": SiglipVisionConfig}])
def test_every_field_of_the_configuration(vision):
    original = tiny_model(**vision)
    weights, keys, made_by = original.state_dict(), keys_of(original), original.fingerprint()
    told_apart, alike = [], []
    for part in ("", "text_config", "vision_config"):
        for what, config in changed_configs(tiny_config(**vision), part):
            model = build(config, weights)
            if model is None:
                continue
            differ = keys_of(model).shape != keys.shape or not torch.allclose(keys_of(model), keys, atol=1e-6)
            if differ:
                assert model.fingerprint() != made_by, what
            (told_apart if model.fingerprint() != made_by else alike).append(what)
    print(f"{len(told_apart)} told apart, {len(alike)} alike: {alike}")
    names = {what.split("=")[0].split(".")[-1] for what in told_apart}
    assert {"vision_feature_layer", "vision_feature_select_strategy", "rms_norm_eps", "rope_parameters"} <= names
    assert {"layer_norm_eps", "hidden_act", "vision_prefix_token_ids", "voco_token_id"} <= names
    names = {what.split("=")[0].split(".")[-1] for what in alike}
    assert {"attention_mode", "num_voco_tokens", "use_cache", "attention_dropout", "max_position_embeddings"} <= names


def changeable(model: Any) -> list[torch.Tensor]:
    """Every weight that keys depend on."""
    last = model.config.text_config.num_hidden_layers - 1
    left_out = ("mlp", "post_attention", "self_attn.q_proj", "self_attn.o_proj")
    names = [f"model.language_model.layers.{last}.{name}" for name in left_out]
    names += ["model.language_model.norm", "model.language_model.embed_tokens", "lm_head"]
    kept = [weight for name, weight in model.named_parameters() if not name.startswith(tuple(names))]
    embedding = model.get_input_embeddings().weight
    return [*kept, *(embedding.data[row] for row in (1, NEWLINE, VOCO))]


def change(weight: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, float]:
    """Writes one value so that PyTorch does not count it; returns where it was and what."""
    place = weight.data.view(-1)[rng.randrange(weight.numel()) :][:1]
    before = place.clone()
    kind = rng.randrange(5)
    if kind == 0:
        place.mul_(1.01)
    elif kind == 1:
        place.neg_()
    elif kind == 2:
        place.zero_()
    elif kind == 3:
        place.copy_(torch.nextafter(place, torch.full_like(place, 9)))
    else:
        place.add_(rng.choice((1e-3, 1.0, 1e4)))
    return place, before


@pytest.mark.parametrize("number", [30, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_single_values(number, dtype):
    model, rng = tiny_model().to(dtype), random.Random(number)
    made_by = model.fingerprint()
    weights = changeable(model)
    told_apart = alike = 0
    while told_apart < number:
        place, before = change(rng.choice(weights), rng)
        if torch.equal(place, before):
            assert model.fingerprint() == made_by
            continue
        assert model.fingerprint(exact=bool(rng.randrange(2))) != made_by
        if rng.randrange(4) == 0:
            fresh = tiny_model().to(dtype)
            fresh.load_state_dict(model.state_dict())
            assert fresh.fingerprint() == model.fingerprint() != made_by
        told_apart += 1
        place.copy_(before)
        assert model.fingerprint() == made_by
        alike += 1
    print(f"{told_apart} changes told apart, {alike} times back to equal")


LORA = {"target_modules": ["q_proj", "v_proj", "k_proj", "fc1", "linear_2"], "r": 2, "init_lora_weights": False}


def switch(model: Any, rng: random.Random) -> str:
    """One of the ways in which the active adapters change."""
    kind = rng.choice(("set", "both", "disable", "enable", "scale", "merge", "write"))
    tuners = [module for module in model.modules() if hasattr(module, "lora_A")]
    if kind == "set":
        model.set_adapter(rng.choice(("cats", "dogs")))
    elif kind == "both":
        model.base_model.set_adapter(["cats", "dogs"])
    elif kind == "disable":
        model.base_model.disable_adapter_layers()
    elif kind == "enable":
        model.base_model.enable_adapter_layers()
    elif kind == "scale":
        name, scale = rng.choice(("cats", "dogs")), rng.choice((0.5, 1.0, 3.0))
        for module in tuners:
            module.set_scale(name, scale)
    elif kind == "merge":
        model.merge_adapter()
        keys_of(model)
        if rng.randrange(2):
            model.unmerge_adapter()
    else:
        # Behind the feature layer the vision tower counts too, though keys do not depend on it
        layer = rng.choice([part for name, part in model.named_modules() if part in tuners and "layers.0." in name])
        layer.lora_B[rng.choice(("cats", "dogs"))].weight.data.view(-1)[rng.randrange(8)] += 0.5
    return kind


@pytest.mark.parametrize("number", [15, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_switches_of_adapters(number, use_dora):
    """References: keys, after every switch."""
    rng = random.Random(number)
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LoraConfig(**LORA, use_dora=use_dora), "cats")
    model.add_adapter("dogs", LoraConfig(**LORA, use_dora=use_dora))
    model.eval()
    seen: list[tuple[Any, torch.Tensor]] = [(tiny_model().fingerprint(), keys_of(tiny_model()))]
    different = equal = 0
    for _ in range(number):
        kind = switch(model, rng)
        keys = keys_of(model)
        made_by = model.fingerprint(exact=False)
        assert made_by == model.fingerprint()
        for other, expected in seen:
            if not torch.allclose(keys, expected, atol=1e-3, rtol=1e-3):
                assert made_by != other, kind
                with pytest.raises(ValueError, match=r"adapter is|weights is"):
                    check_fingerprint(made_by, other, "this one")
                different += 1
            elif torch.equal(keys, expected):
                assert made_by == other, kind
                equal += 1
        seen.append((made_by, keys))
    print(f"{number} switches, {different} pairs told apart, {equal} equal")
    assert different > 0 and equal > 0


@pytest.mark.parametrize("number", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_placements(number, tmp_path):
    rng = random.Random(number)
    for i in range(number):
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
        expected = tiny_model().to(dtype).fingerprint()
        model = tiny_model().to(dtype)
        changed = rng.randrange(3) == 0
        if changed:
            change(rng.choice(changeable(model)), rng)
            changed = model.fingerprint() != expected
        expected = model.fingerprint()
        names = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
        names += [f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb")]
        names += [f"model.language_model.layers.{layer}" for layer in range(3)]
        places = {name: rng.choice(("cpu", "disk")) for name in names}
        places["model.language_model.rotary_emb"] = "cpu"
        placed = dispatch_model(
            model,
            places,
            main_device="cpu",
            offload_dir=tmp_path / str(i),
            force_hooks=True,
            offload_buffers=bool(rng.randrange(2)),
        )
        assert dict(placed.fingerprint()) == dict(expected), places
        assert (placed.fingerprint() == tiny_model().fingerprint()) != changed, places
