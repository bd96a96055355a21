"""Conversion of llava-hf's LLaVA-NeXT and LLaVA-OneVision checkpoints."""

import json

import numpy as np
import pytest
import torch
from conversion.test_convert import CLIP, SIGLIP, TEXT_SIZES, image_processor, llama, make_tokenizer, save_weights
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    MistralConfig,
    Qwen2Config,
)

from voco_llama_hf import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.conversion import convert_checkpoint


GRID = [[28, 56], [56, 28], [56, 56], [84, 84]]
SIZE = {"height": 28, "width": 28}
IMAGE = 259
MISTRAL = MistralConfig(vocab_size=272, num_key_value_heads=2, sliding_window=None, **TEXT_SIZES)
QWEN2 = Qwen2Config(vocab_size=264, num_key_value_heads=1, tie_word_embeddings=True, **TEXT_SIZES)
# Kind, language model, what old versions of transformers name otherwise
CASES = {
    "next, mistral": ("llava_next", MISTRAL, False),
    "next, vicuna, old names": ("llava_next", llama(260), True),
    "onevision, qwen2, tied": ("llava_onevision", QWEN2, False),
    "onevision, qwen2, old names": (
        "llava_onevision",
        Qwen2Config(vocab_size=264, num_key_value_heads=2, **TEXT_SIZES),
        True,
    ),
}


def make_tiled(kind, text_config):
    torch.manual_seed(0)
    if kind == "llava_next":
        config = LlavaNextConfig(
            vision_config=CLIP, text_config=text_config, image_token_index=IMAGE, image_grid_pinpoints=GRID
        )
        return LlavaNextForConditionalGeneration(config).eval()
    config = LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config=text_config,
        image_token_index=IMAGE,
        image_grid_pinpoints=GRID,
        vision_aspect_ratio="anyres_max_4",
    )
    return LlavaOnevisionForConditionalGeneration(config).eval()


def make_image_processor(kind, grid=GRID):
    if kind == "llava_next":
        return LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE, image_grid_pinpoints=grid)
    return LlavaOnevisionImageProcessorPil(size=SIZE, image_grid_pinpoints=grid)


def save(folder, kind, model, old_names=False, images=None, **fields):
    model.save_pretrained(folder)
    if old_names:
        # As the checkpoints on the Hub are, from before transformers 4.52
        names = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
        names |= {f"model.{name}": name for name in ("vision_tower.", "multi_modal_projector.", "image_newline")}
        weights = {}
        for name, tensor in model.state_dict().items():
            old, new = next((old, new) for old, new in names.items() if name.startswith(old))
            weights[name.replace(old, new, 1)] = tensor
        save_weights(folder, weights)
    (images or make_image_processor(kind)).save_pretrained(folder)
    make_tokenizer("<image>").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_converted_has_the_logits_of_the_original_and_goes_back(tmp_path, case):
    kind, text_config, old_names = CASES[case]
    theirs = make_tiled(kind, text_config)
    vocab_size = theirs.config.text_config.vocab_size
    source = save(tmp_path / "source", kind, theirs, old_names)
    report = convert_checkpoint(source, tmp_path / "target", num_voco_tokens=2)
    assert report.source_format == kind and report.processor_written
    model = VoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "target")
    ours = VoCoLlamaProcessor.from_pretrained(tmp_path / "target")
    assert model.config.base_model_type == kind and model.config.image_grid_pinpoints == GRID

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8))
    pixels = make_image_processor(kind)(image, return_tensors="pt")
    inputs = ours(images=image, text="<image>What is it?", return_tensors="pt")
    (features,) = theirs.get_image_features(pixels["pixel_values"], pixels["image_sizes"]).pooler_output
    text = inputs["input_ids"][0, 2:].tolist()
    prompt = torch.tensor([[1, *[IMAGE] * len(features), *text]])
    expected = theirs(prompt, pixel_values=pixels["pixel_values"], image_sizes=pixels["image_sizes"]).logits
    found = model(**inputs, attention_mode="uncompressed")
    columns = [i for i in range(vocab_size) if i != report.voco_token_id]
    length = len(text)
    torch.testing.assert_close(
        found.logits[:, -length:, columns], expected[:, -length:, columns], rtol=1e-4, atol=1e-4
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3

    # Into the class of transformers again
    back, info = type(theirs).from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for name, weight in theirs.state_dict().items():
        again = back.state_dict()[name]
        if weight.shape != again.shape or name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            weight, again = weight[: report.voco_token_id], again[: report.voco_token_id]
        assert torch.equal(again, weight)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_what_does_not_fit_is_refused_with_a_reason(tmp_path, kind):
    model = make_tiled(kind, llama(264))

    def refused(name, match, **changes):
        source = save(tmp_path / name, kind, model, **changes)
        with pytest.raises(ValueError, match=match):
            convert_checkpoint(source, tmp_path / "target")
        assert not (tmp_path / "target").exists()

    refused("grid", "multiples of 28", image_grid_pinpoints=[[30, 50]])
    refused("other grid", "it does not belong to the model", images=make_image_processor(kind, [[28, 56]]))
    refused(
        "without newline", "use_image_newline_parameter False; True was expected", use_image_newline_parameter=False
    )
    source = save(tmp_path / "square", kind, model)
    image_processor().save_pretrained(source)
    with pytest.raises(ValueError, match="image_grid_pinpoints None, but the model"):
        convert_checkpoint(source, tmp_path / "target")
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_tiled(kind, llama(264, rope_parameters=dynamic))
    refused("rope", "changes with the length of the sequence")


def test_a_square_image_processor_for_llava_alone(tmp_path):
    """A LLaVA with an image processor that divides images would read other pixels than it was trained on."""
    from conversion.test_convert import make_llava, save_llava_checkpoint

    source = save_llava_checkpoint(
        tmp_path / "source", make_llava(llama(264), image_token_index=259), make_tokenizer()
    )
    make_image_processor("llava_next").save_pretrained(source)
    with pytest.raises(ValueError, match="but the model None"):
        convert_checkpoint(source, tmp_path / "target")
