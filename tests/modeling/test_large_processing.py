"""The processor with image processors that divide images into tiles, and what models make of its output."""

import numpy as np
import pytest
import torch
from modeling.helpers import TILED, build_processor, tiny_model
from modeling.reference import stock_features, stock_llava
from PIL import Image
from transformers import AutoProcessor, pipeline

from voco_llama_hf import VoCoLlamaProcessor
from voco_llama_hf.modeling.fingerprint_voco_llama import with_images
from voco_llama_hf.modeling.tiles_voco_llama import FRAME, UNDIVIDED


KINDS = list(TILED)
PROCESSORS = {kind: build_processor(kind) for kind in KINDS}
MODELS = {kind: tiny_model(voco_token_id=PROCESSORS[kind].image_token_id, **TILED[kind]) for kind in KINDS}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_image_processor(kind):
    processor, pictures = PROCESSORS[kind], [picture(90, 40), picture(30, 30), picture(20, 200)]
    outputs = processor(
        images=pictures, text="<image>a<image>b<image>c", num_voco_tokens=[2, 1, 3], return_tensors="pt"
    )
    expected = processor.image_processor(pictures, return_tensors="pt")
    torch.testing.assert_close(outputs["pixel_values"], expected["pixel_values"])
    assert outputs["image_sizes"].tolist() == expected["image_sizes"].tolist() == [[40, 90], [30, 30], [200, 20]]
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values", "image_sizes", "num_voco_tokens"}
    assert set(outputs) <= set(processor.model_input_names) and "batch_num_images" not in processor.model_input_names
    assert MODELS[kind].generate(**outputs, max_new_tokens=3).shape[1] == outputs["input_ids"].shape[1] + 3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (500, 10), (10, 500), (1000, 1), (3000, 2000)])
def test_images_of_any_shape_have_the_tokens_of_transformers(kind, size):
    model, llava = MODELS[kind], stock_llava(MODELS[kind])
    outputs = PROCESSORS[kind](images=picture(*size), return_tensors="pt")
    images = {name: outputs[name] for name in ("pixel_values", "image_sizes")}
    (found,), (expected,) = model.model.get_vision_features(**images), stock_features(llava, **images)
    torch.testing.assert_close(found, expected)
    assert model.compress(**outputs).is_finite()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_tile(kind):
    processor, model, pictures = PROCESSORS[kind], MODELS[kind], [picture(56, 28), picture(84, 84)]
    text = "<image>what is <image> here?"
    outputs = processor(images=pictures, text=text, num_voco_tokens_per_tile=2, return_tensors="pt")
    assert outputs["num_voco_tokens"].tolist() == [2] * (3 + 10)
    assert outputs["pixel_values"].shape == (13, 3, 28, 28) and outputs["image_sizes"].tolist() == [[*UNDIVIDED]] * 13
    whole = processor(images=pictures, return_tensors="pt")
    apart, cache = model.compress(**{name: outputs[name] for name in ("pixel_values", "image_sizes")}), None
    cache = model.compress(whole["pixel_values"], image_sizes=whole["image_sizes"], num_voco_tokens_per_tile=2)
    assert len(apart) == len(cache) == 13
    cached = processor(text=text, voco_cache=cache, num_tiles=[3, 10], return_tensors="pt")
    assert torch.equal(cached["input_ids"], outputs["input_ids"])
    options = {"max_new_tokens": 4}
    assert torch.equal(model.generate(**cached, voco_cache=cache, **options), model.generate(**outputs, **options))
    counted = processor._get_num_multimodal_tokens([[28, 56], [84, 84]], num_voco_tokens_per_tile=2)
    assert counted["num_image_tokens"] == [6, 20]


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_for_every_tile_is_saved(tmp_path, kind):
    """And is what a call makes that names none, in a chat and in a pipeline as well."""
    PROCESSORS[kind].save_pretrained(tmp_path)
    MODELS[kind].save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).num_voco_tokens_per_tile is None
    VoCoLlamaProcessor.from_pretrained(tmp_path, num_voco_tokens_per_tile=2).save_pretrained(tmp_path)
    loaded, image = AutoProcessor.from_pretrained(tmp_path), picture(84, 84)
    text = "<image>what?"
    expected = PROCESSORS[kind](images=image, text=text, num_voco_tokens_per_tile=2, return_tensors="pt")
    found = loaded(images=image, text=text, return_tensors="pt")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert loaded(images=image, text=text, num_voco_tokens=3)["num_voco_tokens"] == [3]
    counted = loaded._get_num_multimodal_tokens([[84, 84]])
    assert (counted["num_image_tokens"], counted["num_image_patches"]) == ([20], [len(found["pixel_values"])])
    counted = loaded._get_num_multimodal_tokens([[84, 84]], num_voco_tokens=3)
    assert (counted["num_image_tokens"], counted["num_image_patches"]) == ([3], [1])
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    answer = MODELS[kind].generate(**expected, max_new_tokens=4)[0, expected["input_ids"].shape[1] :]
    (reply,) = pipe(images=[image], text=[text], max_new_tokens=4, return_full_text=False)
    assert reply["generated_text"] == loaded.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_numbers_of_tiles_are_told(kind):
    processor, model = PROCESSORS[kind], MODELS[kind]
    whole = processor(images=picture(56, 28), return_tensors="pt")
    cache = model.compress(whole["pixel_values"], image_sizes=whole["image_sizes"], num_voco_tokens_per_tile=1)
    with pytest.raises(ValueError, match="1 <image> tokens, but the voco_cache has 3 images"):
        processor(text="<image>a", voco_cache=cache)
    with pytest.raises(ValueError, match=r"of \[2\] tiles, but the voco_cache has 3 images"):
        processor(text="<image>a", voco_cache=cache, num_tiles=2)
    with pytest.raises(ValueError, match="num_tiles must be one number of at least 1 for each of 1 images"):
        processor(text="<image>a", voco_cache=cache, num_tiles=[1, 2])
    with pytest.raises(ValueError, match="not both"):
        processor(images=picture(56, 28), text="<image>", num_voco_tokens=1, num_voco_tokens_per_tile=1)
    with pytest.raises(ValueError, match="divides images into tiles"):
        build_processor()(images=picture(56, 28), text="<image>", num_voco_tokens_per_tile=1)
    with pytest.raises(ValueError, match="at least 1"):
        processor(images=picture(56, 28), text="<image>", num_voco_tokens_per_tile=0)
    with pytest.raises(ValueError, match="at least 1"):
        VoCoLlamaProcessor(processor.image_processor, processor.tokenizer, num_voco_tokens_per_tile=0)
    with pytest.raises(ValueError, match="divides images into tiles"):
        VoCoLlamaProcessor(build_processor().image_processor, processor.tokenizer, num_voco_tokens_per_tile=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_not_divided(kind):
    processor, model = PROCESSORS[kind], MODELS[kind]
    film = [picture(60, 40, seed) for seed in range(3)]
    alone = processor(videos=[film], text="<video>a", return_tensors="pt")
    assert alone["pixel_values"].shape == (3, 3, 28, 28) and "image_sizes" not in alone
    (batch,) = processor.iter_pixel_values(film)
    assert torch.equal(batch, alone["pixel_values"])
    overview = processor(images=film, return_tensors="pt")["pixel_values"][:, 0]
    torch.testing.assert_close(batch, overview)
    mixed = processor(images=picture(56, 28), videos=[film], text="<video>a<image>b", return_tensors="pt")
    assert mixed["image_sizes"].tolist() == [[*FRAME]] * 3 + [[28, 56]]
    cache = model.compress(**{name: mixed[name] for name in ("pixel_values", "image_sizes")})
    torch.testing.assert_close(cache[:3].keys, model.compress(batch).keys)
    streamed = model.compress(processor.iter_pixel_values(film, batch_size=2), show_progress=False)
    torch.testing.assert_close(streamed.keys, cache[:3].keys)
    assert model.generate(**mixed, max_new_tokens=2).shape[1] == mixed["input_ids"].shape[1] + 2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_saved_processors_pipelines_and_chats(kind, tmp_path):
    processor, model, image = PROCESSORS[kind], MODELS[kind], picture(90, 40)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is VoCoLlamaProcessor
    assert loaded.image_processor.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = loaded.apply_chat_template(chat, **options)
    answer = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    pipe = pipeline("image-text-to-text", model=str(tmp_path))
    found = pipe(text=chat, max_new_tokens=4)[0]["generated_text"][-1]["content"]
    assert found == processor.decode(answer, skip_special_tokens=True)
    several = pipe(images=[image, picture(20, 80)], text=["<image>a", "<image>b"], batch_size=2, max_new_tokens=2)
    assert len(several) == 2
    per_tile = {"num_voco_tokens_per_tile": 1}
    assert pipe(text=chat, max_new_tokens=4, processor_kwargs=per_tile)[0]["generated_text"][-1]["content"] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_of_the_processor_belongs_to_the_fingerprint(kind):
    own, other = build_processor(kind).image_processor, build_processor(kind).image_processor
    other.image_grid_pinpoints = [[28, 56]]
    fingerprint = MODELS[kind].fingerprint()
    assert with_images(fingerprint, own) != with_images(fingerprint, other)


@pytest.mark.parametrize("kind", KINDS)
def test_another_grid_than_the_model_has_is_told(kind):
    outputs = PROCESSORS[kind](images=picture(140, 140), image_grid_pinpoints=[[140, 140]], return_tensors="pt")
    with pytest.raises(ValueError, match="another image_grid_pinpoints than the model"):
        MODELS[kind].compress(**outputs)
