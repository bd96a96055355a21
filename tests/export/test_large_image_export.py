"""Models that divide images into tiles on ONNX Runtime, against PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import TILED, build_processor, random_images, tiny_model
from modeling.test_large_processing import picture

from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx


@pytest.fixture(scope="module", params=TILED)
def models(request, tmp_path_factory):
    """A model, its processor, and the same exported, loaded, saved and loaded again."""
    processor = build_processor(request.param)
    model = tiny_model(
        voco_token_id=processor.image_token_id, **{**TILED[request.param], "text": {"num_hidden_layers": 2}}
    )
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(model, folder / "exported", processor, images=[picture(90, 40)], questions=["What?"])
    ORTVoCoLlamaForConditionalGeneration.from_pretrained(folder / "exported").save_pretrained(folder / "copied")
    return model, processor, ORTVoCoLlamaForConditionalGeneration.from_pretrained(folder / "copied")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=4), st.integers(1, 3))
def test_images_of_any_size_are_compressed_alike(models, shapes, k):
    model, _, exported = models
    images = random_images(model, shapes)
    with torch.no_grad():
        expected = model.compress(**images, num_voco_tokens=k)
    found = exported.compress(**images, num_voco_tokens=k)
    torch.testing.assert_close(found.keys, expected.keys, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.values, expected.values, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_answers_and_videos(models):
    model, processor, exported = models
    film = [picture(60, 40, seed) for seed in range(3)]
    for inputs in (
        processor(images=[picture(90, 40), picture(30, 30)], text="<image>a<image>b", return_tensors="pt"),
        processor(images=picture(90, 40), text="<image>a", num_voco_tokens_per_tile=1, return_tensors="pt"),
        processor(videos=[film], images=picture(20, 90), text="<image>a<video>b", return_tensors="pt"),
    ):
        expected, found = (each.generate(**inputs, max_new_tokens=5) for each in (model, exported))
        assert torch.equal(found, expected)
        torch.testing.assert_close(
            exported(**inputs).logits[:, -1], model(**inputs).logits[:, -1], atol=1e-3, rtol=1e-3
        )


def test_what_does_not_fit_is_told(models):
    model, _, exported = models
    images = random_images(model, [(28, 56), (84, 84)])
    with pytest.raises(ValueError, match="the model expects"):
        exported.compress(images["pixel_values"][:, :4], image_sizes=images["image_sizes"])
    with pytest.raises(ValueError, match="vision model"):
        ORTVoCoLlamaForConditionalGeneration(exported.compressor, exported.decoder, exported.config)
