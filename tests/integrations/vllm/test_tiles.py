"""Images that a model divides into tiles, each into its own number of them."""

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from modeling.helpers import TILED, build_processor
from PIL import Image
from transformers import MistralConfig, SiglipVisionConfig


pytest.importorskip("vllm.version")  # `vllm` alone is this folder too

from integrations.vllm.engines import VOCO, answer, running, save_tiny, servable_config

from voco_llama_hf import VoCoLlamaConfig
from voco_llama_hf.store import Content, VoCoStore
from voco_llama_hf.store.content import TILES


CONFIGS = {
    "llava_next": servable_config(**TILED["llava_next"]),
    "llava_next mistral": servable_config(MistralConfig, text={"sliding_window": 24}, **TILED["llava_next"]),
    "llava_onevision": servable_config(**TILED["llava_onevision"]),
}
OPTIONS = {"max_model_len": 400}


@pytest.fixture(scope="module", params=TILED)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_tiny(folder, CONFIGS[request.param]), build_processor(request.param)


def picture(rng, height: int, width: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def random_pictures(number: int, seed: int = 0) -> list[Image.Image]:
    """Of any shape: wide, high, tiny, and larger than the grid."""
    rng = np.random.default_rng(seed)
    shapes = [(1, 1), (28, 28), (100, 3), *rng.integers(1, 150, (number, 2)).tolist()]
    return [picture(rng, *shape) for shape in shapes[:number]]


def film(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (number, 40, 60, 3), np.uint8)


def asked(text: str, **options: Any) -> dict[str, Any]:
    """A prompt of vLLM; `images`, `videos` and the number of VoCo tokens are what the processor takes."""
    data = {kind: options.pop(f"{kind}s") for kind in ("image", "video") if options.get(f"{kind}s")}
    prompt: dict[str, Any] = {"prompt": text}
    if data:
        prompt |= {"multi_modal_data": data, "mm_processor_kwargs": options}
    return prompt


def reference(model, processor, text: str, **options: Any) -> list[int]:
    """What `generate` answers."""
    options = {name: value for name, value in options.items() if value}
    inputs = processor(text=text, **options, return_tensors="pt")
    cache = {"voco_cache": options["voco_cache"]} if "voco_cache" in options else {}
    output = model.generate(**inputs, **cache, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def random_questions(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts with images, one of a few in many of them, or without; k for an image or for each of its tiles."""
    rng, images = np.random.default_rng(seed), random_pictures(8, seed)
    questions = []
    for _ in range(number):
        parts = rng.permutation([True] * rng.integers(0, 4) + [False] * rng.integers(1, 4))
        words = ["".join(map(chr, rng.integers(97, 123, rng.integers(1, 20)))) for _ in parts]
        text = "".join("<image>" if is_image else word for is_image, word in zip(parts, words))
        chosen = [images[rng.integers(len(images))] for _ in range(sum(parts))]
        name, limit = [("num_voco_tokens", 20), ("num_voco_tokens_per_tile", 4)][rng.integers(2)]
        questions.append({"text": text, "images": chosen, name: int(rng.integers(1, limit))})
    return questions


@pytest.mark.parametrize("name", CONFIGS)
def test_random_prompts(name, tmp_path):
    """An image has more tokens than a step, which is of 32; asked again, everything is known."""
    # One of them with the names that older classes gave to weights
    model = save_tiny(tmp_path, CONFIGS[name], save_original_format="mistral" in name)
    processor, questions = build_processor(CONFIGS[name].base_model_type), random_questions(16)
    expected = [reference(model, processor, **question) for question in questions]
    prompts = [asked(**question) for question in questions]
    with running(tmp_path, max_num_batched_tokens=32, **OPTIONS) as engine:
        for _ in range(2):
            assert answer(engine, prompts) == expected


def test_a_model_that_was_trained_for_tiles_is_asked_so(checkpoint, tmp_path):
    folder, model, processor = checkpoint
    trained = shutil.copytree(folder, tmp_path / "trained")
    type(processor).from_pretrained(folder, num_voco_tokens_per_tile=2).save_pretrained(trained)
    question = {"text": "<image>and<image>What?", "images": random_pictures(8)[4:6]}
    whole, per_tile = ({"num_voco_tokens": 2}, {"num_voco_tokens_per_tile": 2})
    expected = [reference(model, processor, **question, **number) for number in (per_tile, whole)]
    assert expected[0] != expected[1]
    with running(trained, **OPTIONS) as engine:
        assert answer(engine, [asked(**question), asked(**question, **whole)]) == expected


def test_images_together(checkpoint):
    """Many images in one step, those of one length compressed together, each once."""
    from voco_llama_hf.integrations.vllm.model import VoCoLlamaForConditionalGeneration

    folder, model, processor = checkpoint
    rng = np.random.default_rng(1)
    images = [picture(rng, *shape) for shape in [(60, 30), (30, 60), (60, 30), (200, 200), (30, 60), (60, 30)]]
    questions = [
        {"text": "<image>" * 6 + "Which?", "images": images, "num_voco_tokens": 2},
        {"text": "What is <image>?", "images": images[3:4], "num_voco_tokens": 2},
        {"text": "What is <image>?", "images": images[:1], "num_voco_tokens_per_tile": 2},
    ]
    compressed: list[int] = []
    compress = VoCoLlamaForConditionalGeneration._compress

    def counting(self, vision, counts):
        compressed.append(len(vision))
        return compress(self, vision, counts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VoCoLlamaForConditionalGeneration, "_compress", counting)
        with running(folder, max_num_batched_tokens=2048, **OPTIONS) as engine:
            compressed.clear()  # of what measures memory
            for _ in range(2):
                answers = answer(engine, [asked(**question) for question in questions])
                assert answers == [reference(model, processor, **question) for question in questions]
    tiles = len(processor(images=images[0], num_voco_tokens_per_tile=1)["num_voco_tokens"])
    assert sum(compressed) == 6 + tiles and 3 in compressed


def test_frames_are_not_divided(checkpoint):
    folder, model, processor = checkpoint
    frames = film(3)
    still = Image.fromarray(frames[0])
    text = "<image>and<video>What moves?"
    questions = [
        {"text": text, "images": [still], "videos": [frames], "num_voco_tokens": 2},
        {"text": text, "images": [still], "videos": [frames], "num_voco_tokens_per_tile": 2},
        {"text": "What is <image>?", "images": [still], "num_voco_tokens": 2},
        {"text": "What is <video>?", "videos": [frames[:1]], "num_voco_tokens": 2},
    ]
    with running(folder, **OPTIONS) as engine:
        for prompts in ([asked(**question) for question in questions], [with_names(**own) for own in questions]):
            assert answer(engine, prompts) == [reference(model, processor, **question) for question in questions]


def with_names(**question: Any) -> dict[str, Any]:
    """A still and a film that a client calls the same."""
    prompt = asked(**question)
    names = {kind: ["it"] for kind in prompt["multi_modal_data"]}
    return prompt | {"multi_modal_uuids": names}


def test_compressed_images(checkpoint, tmp_path):
    """From a store by the hash of their file, and as caches of whole images or of tiles; nothing is compressed."""
    from voco_llama_hf.integrations.vllm.model import VoCoLlamaForConditionalGeneration

    folder, model, processor = checkpoint
    images, text, store = random_pictures(5)[3:], "<image>and<image>Which?", tmp_path / "store"
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, images):
        image.save(path)
    pixels = {name: own for name, own in processor(images=images, return_tensors="pt").items() if "num" not in name}
    whole = model.compress(**pixels, num_voco_tokens=3)
    tiles = model.compress(**pixels, num_voco_tokens_per_tile=2)
    first = len(processor(images=images[0], num_voco_tokens_per_tile=2)["num_voco_tokens"])
    contents = [Content.of_file(path) for path in paths]
    with VoCoStore(store, model.fingerprint()) as made:
        made.add(contents, list(whole))
        made.add([replace(content, sampling=TILES) for content in contents], [tiles[:first], tiles[first:]])
    named = {
        "prompt": text,
        "multi_modal_data": {"image": [None, None]},
        "multi_modal_uuids": {"image": [content.content_hash for content in contents]},
        "mm_processor_kwargs": {"num_voco_tokens": 3},
    }
    in_tiles = [tiles[:first], tiles[first:]]
    expected = [
        reference(model, processor, text, images=images, num_voco_tokens=3),
        reference(model, processor, text, images=images, num_voco_tokens=3),
        reference(model, processor, text, images=images, num_voco_tokens_per_tile=2),
        reference(model, processor, text, voco_cache=tiles, num_tiles=[first, len(tiles) - first]),
    ]
    options = {"additional_config": {"voco_llama": {"store": str(store)}}, **OPTIONS}
    with running(folder, **options) as engine, pytest.MonkeyPatch.context() as patch:
        patch.delattr(VoCoLlamaForConditionalGeneration, "_compress")
        assert answer(engine, [named, asked(text, images=list(whole))]) == expected[:2]
        assert answer(engine, [asked(text, images=in_tiles, num_voco_tokens_per_tile=2)]) == expected[2:3]
        assert answer(engine, [named | {"mm_processor_kwargs": {"num_voco_tokens_per_tile": 2}}]) == expected[2:3]
    assert expected[2] == expected[3]


def test_wrong_numbers(checkpoint):
    folder, model, processor = checkpoint
    image, text = random_pictures(6)[5], "What is <image>?"
    (cache,) = model.compress(**processor(images=image, return_tensors="pt"))
    with running(folder, mm_processor_kwargs={"num_voco_tokens_per_tile": 2}, **OPTIONS) as engine:
        for options, message in (
            ({"images": [image], "num_voco_tokens": 1, "num_voco_tokens_per_tile": 1}, "not both"),
            ({"images": [image], "num_voco_tokens_per_tile": 0}, "num_voco_tokens_per_tile must be one number from 1"),
            ({"images": [image], "num_voco_tokens_per_tile": [1]}, "num_voco_tokens_per_tile must be one number"),
            ({"images": [image], "num_voco_tokens_per_tile": 300}, "makes .* it can have"),
            ({"images": [image], "num_tiles": 2}, "only num_voco_tokens and num_voco_tokens_per_tile are taken"),
            ({"images": [cache], "num_voco_tokens_per_tile": 2}, "num_voco_tokens_per_tile=2 was asked of"),
        ):
            with pytest.raises(ValueError, match=message):
                engine.generate(asked(text, **options), use_tqdm=False)
        # What the server was started with, and what a request says instead
        assert answer(engine, [asked(text, images=[image]), asked(text, images=[image], num_voco_tokens=3)]) == [
            reference(model, processor, text, images=[image], num_voco_tokens_per_tile=2),
            reference(model, processor, text, images=[image], num_voco_tokens=3),
        ]


def test_memory_is_measured_by_the_image_of_most_tiles(checkpoint):
    from vllm import EngineArgs
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from voco_llama_hf.integrations.vllm.processing import costliest_size

    config = EngineArgs(model=str(checkpoint[0]), max_model_len=256).create_engine_config().model_config
    inputs = MULTIMODAL_REGISTRY.create_processor(config).get_dummy_mm_inputs({"image": 1})
    (image,) = inputs["mm_kwargs"]["image"]
    assert image["pixel_values"].data.shape == (1, 10, 3, 28, 28) and image["image_sizes"].data.tolist() == [[84, 84]]
    assert image["num_voco_tokens"].data == inputs["prompt_token_ids"].count(VOCO) == 255
    # Whose tokens are scaled down behind the vision tower, so that others have more
    vision = SiglipVisionConfig(image_size=384, patch_size=14)
    onevision = VoCoLlamaConfig(base_model_type="llava_onevision", vision_config=vision)
    assert costliest_size(onevision) == (6 * 384, 6 * 384)


def test_a_processor_of_another_grid(tmp_path):
    save_tiny(tmp_path, CONFIGS["llava_next"])
    processor = build_processor("llava_next")
    processor.image_processor.image_grid_pinpoints = [[28, 56]]
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not belong to the model"), running(tmp_path, **OPTIONS):
        pass


ROTATIONS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("name", ROTATIONS)
def test_positions_are_as_many_as_the_table_of_vllm_has(name):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from voco_llama_hf.integrations.vllm.limits import num_positions

    rope = {"rope_theta": 10_000.0, **ROTATIONS[name]}
    config = servable_config(text={"rope_parameters": rope, "max_position_embeddings": 64})
    with set_current_vllm_config(VllmConfig()):
        table = get_rope(32, 64, rope_parameters=config.text_config.rope_parameters).cos_sin_cache
    assert num_positions(config) == len(table)


def test_more_vision_tokens_than_positions(tmp_path):
    """The largest image is refused at the start; k is bounded by the room that it leaves."""
    from vllm import EngineArgs

    from voco_llama_hf.integrations.vllm.limits import max_num_voco_tokens

    tokens = 9 * 4 + 6 + 4 + 2
    for positions, room in ((tokens, 0), (tokens + 1, 1), (tokens + 30, 30)):
        text = {"max_position_embeddings": positions}
        save_tiny(tmp_path, servable_config(text=text, **TILED["llava_next"]))
        start = EngineArgs(model=str(tmp_path), dtype="float32").create_engine_config
        if room == 0:
            with pytest.raises(ValueError, match=f"46 vision tokens, but there is room for 45: .* {tokens} positions"):
                start()
        else:
            assert max_num_voco_tokens(start().model_config) == room
