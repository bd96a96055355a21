"""The ways in which vLLM runs a model change nothing."""

import pytest
import torch
from modeling.helpers import build_processor


pytest.importorskip("vllm.version")  # `vllm` alone is this folder too

from integrations.vllm.engines import (
    VOCO,
    answer,
    for_vllm,
    random_images,
    random_prompts,
    reference,
    running,
    save_tiny,
    servable_config,
)


NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, save_tiny(folder, servable_config())


def test_an_image_is_compressed_once(checkpoint, monkeypatch):
    """However many requests ask about it, at once or later, as long as they ask for the same k."""
    from voco_llama_hf.integrations.vllm.model import VoCoLlamaForConditionalGeneration

    compressed: list[int] = []
    compress = VoCoLlamaForConditionalGeneration._compress

    def counting(self, vision, counts):
        compressed.append(len(vision))
        return compress(self, vision, counts)

    folder, model = checkpoint
    processor, (image, other) = build_processor(), random_images(2)
    prompts = [
        {"prompt_token_ids": [VOCO, VOCO, *range(20, 20 + length)], "images": [image, other], "k": k}
        for length in (3, 9, 40)
        for k in (2, 5)
    ]
    monkeypatch.setattr(VoCoLlamaForConditionalGeneration, "_compress", counting)
    with running(folder, max_model_len=256) as engine:
        compressed.clear()  # of what measures memory
        for _ in range(2):
            answers = answer(engine, [for_vllm(prompt) for prompt in prompts])
            assert answers == [reference(model, processor, prompt) for prompt in prompts]
    assert sum(compressed) == 2 * 2


def test_compressed_images_in_pieces(checkpoint):
    """A prompt of many compressed images, read in chunks; what is not known of them is no number."""
    from vllm import SamplingParams

    folder, model = checkpoint
    pixels = build_processor()(images=random_images(9), return_tensors="pt")["pixel_values"]
    cache = model.compress(pixels, num_voco_tokens=7)
    ids = torch.tensor([[*[VOCO] * 63, 30, 31, 32]])
    expected = model.generate(ids, voco_cache=cache, max_new_tokens=8, do_sample=False)[0, 66:].tolist()
    prompt = {"prompt_token_ids": [VOCO, 30, 31, 32], "multi_modal_data": {"image": cache}}
    with running(folder, max_model_len=256, max_num_batched_tokens=16) as engine:
        sampled = SamplingParams(temperature=1.0, top_p=0.9, top_k=5, max_tokens=8)
        assert len(engine.generate(prompt, sampled, use_tqdm=False)[0].outputs[0].token_ids) == 8
        assert answer(engine, [prompt]) == [expected]
        (output,) = engine.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        behind, later = (next(iter(output.prompt_logprobs[column].values())).logprob for column in (63, 64))
        assert behind != behind and later < 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"max_num_batched_tokens": 16, "additional_config": {"voco_llama": {"image_cache_mb": 1}}},
    ],
    ids=["compiled", "tensor parallel", "small memory"],
)
def test_other_ways_to_run(checkpoint, options):
    check_answers(checkpoint, options)


def check_answers(checkpoint, options):
    folder, model = checkpoint
    processor, images = build_processor(), random_images(3)
    prompts = random_prompts(12, images, max_k=9, seed=1)
    expected = [reference(model, processor, prompt) for prompt in prompts]
    cache = model.compress(processor(images=images, return_tensors="pt")["pixel_values"], num_voco_tokens=4)
    ids = torch.tensor([[*[VOCO] * 12, 40, 41]])
    stored = model.generate(ids, voco_cache=cache, max_new_tokens=8, do_sample=False)[0, 14:].tolist()
    with running(folder, max_model_len=256, **options) as engine:
        assert answer(engine, [for_vllm(prompt) for prompt in prompts]) == expected
        given = {"prompt_token_ids": [VOCO, 40, 41], "multi_modal_data": {"image": cache}}
        assert answer(engine, [given]) == [stored]


@pytest.mark.slow
def test_encoder_cache_on_disk(checkpoint, tmp_path, monkeypatch):
    """vLLM's example of an encoder-cache connector keeps compressed images over a restart."""
    from voco_llama_hf.integrations.vllm.model import VoCoLlamaForConditionalGeneration

    folder, model = checkpoint
    prompt = {"prompt_token_ids": [VOCO, 50, 51], "images": random_images(1), "k": 6}
    transfer = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    expected = reference(model, build_processor(), prompt)
    with running(folder, max_model_len=256, ec_transfer_config=transfer) as engine:
        assert answer(engine, [for_vllm(prompt)]) == [expected]
    with running(folder, max_model_len=256, ec_transfer_config=transfer) as engine:
        monkeypatch.delattr(VoCoLlamaForConditionalGeneration, "_compress")
        assert answer(engine, [for_vllm(prompt)]) == [expected]


@pytest.mark.slow
def test_speculation(checkpoint, monkeypatch):
    # In a process of its own: vLLM does not start again in one that has loaded numba, which n-grams are found by
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    check_answers(checkpoint, {"speculative_config": NGRAMS})
