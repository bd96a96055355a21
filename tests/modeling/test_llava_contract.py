"""What users of transformers' LLaVA expect of a class derived from it."""

import inspect

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from modeling.helpers import random_inputs, tiny_model
from modeling.reference import stock_llava
from transformers import AutoModelForMultimodalLM, LlavaForConditionalGeneration

from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.modeling.compat_voco_llama import SELECTS_HIDDEN_STATES


LAYOUT = [["text:3", "image:2", "text:4"], ["image:1", "text:2"]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs(model):
    return random_inputs(model, LAYOUT)


@torch.no_grad()
def test_image_features_are_those_of_llava(model, inputs):
    llava, pixels = stock_llava(model), inputs["pixel_values"]
    ours, theirs = (
        torch.stack(list(which.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))
        for which in (model, llava)
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.model.get_vision_features(pixels), theirs)
    assert isinstance(model.get_image_features(pixel_values=pixels, return_dict=False), tuple)


@torch.no_grad()
@pytest.mark.parametrize("layer, strategy", [(0, "default"), (-1, "default"), ([-1], "default"), (-2, "full")])
@pytest.mark.parametrize("use_cache", [False, True], ids=["single pass", "two stages"])
def test_vision_features_of_a_call(model, inputs, layer, strategy, use_cache):
    """They are obeyed as by a model that was configured so."""
    chosen = {"vision_feature_layer": layer, "vision_feature_select_strategy": strategy}
    other = tiny_model(**chosen)
    expected = other(**inputs, use_cache=use_cache).logits
    text = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        model(**inputs, **chosen, use_cache=use_cache).logits[text], expected[text], **TOLERANCE
    )
    usual = model(**inputs, use_cache=use_cache).logits
    assert layer == -2 or not torch.allclose(usual[text], expected[text], **TOLERANCE)
    answers = [which.generate(**inputs, **extra, max_new_tokens=3) for which, extra in ((model, chosen), (other, {}))]
    assert torch.equal(*answers)


NOT_OURS = {"image_sizes": torch.ones(3, 2), "mm_encoder_outputs": {"image": object()}}


def test_no_argument_of_llava_vanishes(model, inputs):
    """Each is one of ours, or refused with its name."""
    ours = inspect.signature(VoCoLlamaForConditionalGeneration.forward).parameters
    for name in inspect.signature(LlavaForConditionalGeneration.forward).parameters:
        if name in ours:
            continue
        with pytest.raises(ValueError, match=name):
            model(**inputs, **{name: NOT_OURS[name]})


@torch.no_grad()
@pytest.mark.skipif(not SELECTS_HIDDEN_STATES, reason="this transformers returns all hidden states or none")
@pytest.mark.parametrize("use_cache", [False, True], ids=["single pass", "two stages"])
def test_hidden_states_of_one_layer(model, inputs, use_cache):
    every = model(**inputs, use_cache=use_cache, output_hidden_states=True).hidden_states
    chosen = model(**inputs, use_cache=use_cache, output_hidden_states=[2]).hidden_states
    assert len(every) == 4
    torch.testing.assert_close(chosen[2], every[2])


@torch.no_grad()
def test_the_cache_has_both_its_names(model, inputs):
    outputs = model(**inputs, use_cache=True)
    assert outputs.cache is outputs.past_key_values
    assert outputs.cache.get_seq_length() == inputs["input_ids"].shape[1]
    following = {"input_ids": torch.full((2, 1), 5)}
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    by_old_name = model(**following, attention_mask=mask, past_key_values=outputs.cache).logits
    again = model(**inputs, use_cache=True).cache
    torch.testing.assert_close(model(**following, attention_mask=mask, cache=again).logits, by_old_name)


def test_tuples_hold_the_cache_once(model, inputs):
    outputs = model(**inputs, use_cache=True, return_dict=False)
    assert len(outputs) == 2


def test_multimodal_lm_is_an_auto_class_of_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert type(AutoModelForMultimodalLM.from_pretrained(tmp_path)) is VoCoLlamaForConditionalGeneration


def disk_offloaded(part: str):
    def offload(model, folder):
        disk_offload(model.get_submodule(part), folder, execution_device=torch.device("cpu"))
        return model

    return offload


PLACEMENTS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "whole model on disk": disk_offloaded(""),
    "language model on disk": disk_offloaded("model.language_model"),
    "vision tower on disk": disk_offloaded("model.vision_tower"),
    "embeddings on disk": disk_offloaded("model.language_model.embed_tokens"),
    "device map": lambda model, folder: dispatch_model(
        model,
        {
            "model.vision_tower": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "disk",
            "lm_head": "cpu",
        },
        main_device="cpu",
        offload_dir=folder,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_offloaded_models_answer(model, inputs, placement, tmp_path):
    """Weights that wait on disk or elsewhere have a shape in the model and no content."""
    expected = model.generate(**inputs, max_new_tokens=4)
    logits = model(**inputs, use_cache=False).logits
    offloaded = PLACEMENTS[placement](tiny_model(), tmp_path) or model
    assert torch.equal(offloaded.generate(**inputs, max_new_tokens=4), expected)
    torch.testing.assert_close(offloaded(**inputs, use_cache=False).logits, logits)
    cache = offloaded.compress(inputs["pixel_values"], inputs["num_voco_tokens"])
    cached = {name: value for name, value in inputs.items() if name != "pixel_values"}
    assert torch.equal(offloaded.generate(**cached, voco_cache=cache, max_new_tokens=4), expected)
    embeds = offloaded.get_input_embeddings()(inputs["input_ids"])
    from_embeds = {**inputs, "inputs_embeds": embeds, "input_ids": None}
    assert torch.equal(
        offloaded.generate(**from_embeds, max_new_tokens=4), expected[:, inputs["input_ids"].shape[1] :]
    )
