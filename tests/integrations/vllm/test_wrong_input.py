"""What could be answered wrongly is refused, in a sentence."""

import numpy as np
import pytest
import torch


pytest.importorskip("vllm.version")  # `vllm` alone is this folder too

from integrations.vllm.engines import answer, random_images, running, save_tiny, servable_config
from PIL import Image

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration
from voco_llama_hf.store import Content, VoCoStore, hash_file


QUESTION = "<image>\nWhat colour is the circle?\n"


@pytest.fixture(scope="module")
def store(embedded, tmp_path_factory):
    """A store of two images, and their files."""
    model, processor = embedded
    folder = tmp_path_factory.mktemp("archive")
    paths = [folder / f"{number}.png" for number in range(2)]
    for path, image in zip(paths, random_images(2, size=64)):
        image.save(path)
    with VoCoStore(folder / "store", model.fingerprint()) as made:
        pixels = processor(images=paths)["pixel_values"]
        caches = [model.compress(torch.as_tensor(np.array(own))[None], num_voco_tokens=2) for own in pixels]
        made.add([Content.of_file(path) for path in paths], caches)
    return folder / "store", paths


@pytest.fixture(scope="module")
def engine(store):
    options = {"voco_llama": {"store": str(store[0])}}
    with running(EMBEDDED_CHECKPOINT, max_model_len=512, additional_config=options) as started:
        yield started


def expected(embedded, text, images, count):
    model, processor = embedded
    inputs = processor(images=images, text=text, num_voco_tokens=count, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def test_text_is_rendered_as_the_processor_does(engine, embedded):
    first, second = random_images(2, size=80)
    for text, images in (
        (QUESTION, [first]),
        ("Look: <image> and <image>\nWhich is redder?\n", [first, second]),
        ("<image><image>", [second, first]),
        ("What is red?\n", []),
    ):
        prompt = {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})}
        inputs = embedded[1](images=images or None, text=text)
        (output,) = engine.generate(prompt, use_tqdm=False)
        assert output.prompt_token_ids == inputs["input_ids"][0]
        assert answer(engine, [prompt]) == [expected(embedded, text, images or None, 1)] if images else True


def test_videos_are_frames(engine, embedded):
    frames = np.stack([np.array(image) for image in random_images(3, size=64)])
    still = random_images(1, size=64, seed=9)[0]
    text = "<image>\n<video>\nWhat moves?\n"
    prompt = {"prompt": text, "multi_modal_data": {"image": still, "video": frames}}
    model, processor = embedded
    inputs = processor(images=still, videos=[list(frames)], text=text, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert answer(engine, [prompt]) == [output[0, inputs["input_ids"].shape[1] :].tolist()]


def test_compressed_images_are_answered_like_pixels(engine, embedded, store):
    path, paths = store
    count = {"num_voco_tokens": 2}
    wanted = expected(embedded, QUESTION, paths[0], 2)
    with VoCoStore(path) as opened:
        cache = opened.get(hash_file(paths[0]))
    given = {"prompt": QUESTION, "multi_modal_data": {"image": cache}}
    named = {
        "prompt": QUESTION,
        "multi_modal_data": {"image": [None]},
        "multi_modal_uuids": {"image": [hash_file(paths[0])]},
        "mm_processor_kwargs": count,
    }
    beside = {
        "prompt": "<image> or <image>\nWhich?\n",
        "multi_modal_data": {"image": [cache, Image.open(paths[1])]},
        "mm_processor_kwargs": count,
    }
    assert answer(engine, [given, named]) == [wanted, wanted]
    assert answer(engine, [beside]) == [expected(embedded, beside["prompt"], paths, 2)]


def test_wrong_prompts(engine, embedded, store):
    image, processor = random_images(1, size=64)[0], embedded[1]
    with VoCoStore(store[0]) as opened:
        cache = opened.get(hash_file(store[1][0]))
    other = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT)
    with torch.no_grad():
        other.model.get_input_embeddings().weight[4] += 1
    alien = other.compress(processor(images=image, return_tensors="pt")["pixel_values"])
    pixels = {"image": image}
    voco = processor.image_token_id

    def asked(**options):
        return {"prompt": QUESTION, "multi_modal_data": pixels, "mm_processor_kwargs": options}

    for prompt, message in (
        ({"prompt": "What is <voco>?\n"}, "<voco> is put in"),
        ({"prompt": "<voco>" + QUESTION, "multi_modal_data": pixels}, "<voco> is put in"),
        ({"prompt_token_ids": [1, voco, 50]}, "1 <voco> tokens, but 0 images"),
        ({"prompt_token_ids": [voco, voco, 50], "multi_modal_data": pixels}, "2 <voco> tokens, but 1 images"),
        ({"prompt": "What is this?\n", "multi_modal_data": pixels}, "0 <image> tokens, but 1 images"),
        ({"prompt": "<image>\n" + QUESTION, "multi_modal_data": pixels}, "2 <image> tokens, but 1 images"),
        ({"prompt": "Where is <image>?\n"}, "1 <image> tokens, but 0 images"),
        (asked(num_voco_tokens=0), "from 1 to 511"),
        (asked(num_voco_tokens=512), "from 1 to 511"),
        (asked(num_voco_tokens=[2]), "one number"),
        (asked(num_voco_tokens=True), "one number"),
        (asked(size={"height": 32, "width": 32}), "only num_voco_tokens and num_voco_tokens_per_tile are"),
        (asked(num_voco_tokens_per_tile=1), "num_voco_tokens_per_tile needs a model that divides images"),
        ({"prompt": QUESTION, "multi_modal_data": {"image": alien}}, "made by another model"),
        ({"prompt": QUESTION, "multi_modal_data": {"image": torch.rand(64, 64)}}, "height, width, 3"),
        ({"prompt": QUESTION, "multi_modal_data": {"image": [None]}, "multi_modal_uuids": {"image": ["0" * 64]}}, ""),
        ({"prompt": "What is\n<image>", "multi_modal_data": {"image": cache}}, "cannot end with a compressed image"),
        (
            {"prompt": QUESTION, "multi_modal_data": {"image": cache}, "mm_processor_kwargs": {"num_voco_tokens": 3}},
            "has 2 VoCo tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate(prompt, use_tqdm=False)
    # And goes on
    assert answer(engine, [asked(num_voco_tokens=2)]) == [expected(embedded, QUESTION, image, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallel"),
        ({"enable_lora": True}, "LoRA"),
        ({"enable_prompt_embeds": True}, "prompt-embeds"),
        ({"enable_dbo": True, "ubatch_size": 2}, "divide the tokens"),
        ({"hf_overrides": {"image_grid_pinpoints": [[64, 128]]}}, "divides no images"),
        ({"additional_config": {"voco_llama": {"stores": "photos"}}}, "stores"),
    ],
)
def test_wrong_ways_to_start(options, message):
    from vllm import EngineArgs

    with pytest.raises(ValueError, match=message):
        EngineArgs(model=EMBEDDED_CHECKPOINT, **options).create_engine_config()


def test_wrong_stores(embedded, tmp_path):
    from voco_llama_hf.integrations.vllm.stored_images import ServedModel, StoreReader

    class ModelConfig:
        hf_config, model, revision, quantization = embedded[0].config, EMBEDDED_CHECKPOINT, None, None

    served, processor = ServedModel(ModelConfig()), embedded[1]
    with pytest.raises(FileNotFoundError):
        StoreReader(str(tmp_path / "none"), served, processor)
    fingerprint = embedded[0].fingerprint()
    VoCoStore(tmp_path / "other", {**fingerprint, "head_dim": "65"}).close()
    with pytest.raises(ValueError, match="head_dim is 65, not 64"):
        StoreReader(str(tmp_path / "other"), served, processor)
    ModelConfig.quantization = "fp8"
    with pytest.raises(ValueError, match="quantization=fp8"):
        served.check(None, processor, "this VoCoCache")


def test_unknown_text_model(tmp_path):
    from transformers import Olmo2Config
    from vllm import EngineArgs

    save_tiny(tmp_path, servable_config(Olmo2Config))
    with pytest.raises(ValueError, match="olmo2"):
        EngineArgs(model=str(tmp_path)).create_engine_config()


def test_memory_is_bounded():
    from vllm import EngineArgs

    from voco_llama_hf.integrations.vllm.limits import num_rows, row_bytes

    def start(**options):
        args = EngineArgs(model=EMBEDDED_CHECKPOINT, max_model_len=512, max_num_batched_tokens=8192, **options)
        return args.create_engine_config()

    free, bounded = start(), start(additional_config={"voco_llama": {"image_cache_mb": 4}})
    assert row_bytes(free) == 2 * 6 * 2 * 64 * 2 + 256 * 2
    assert free.scheduler_config.encoder_cache_size == num_rows(free) == 8192
    assert num_rows(bounded) * row_bytes(bounded) <= 4 << 20
    assert bounded.scheduler_config.encoder_cache_size == num_rows(bounded)
