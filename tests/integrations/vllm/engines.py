"""Engines of vLLM in this process, and what `generate` answers to the same prompts."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modeling.helpers import BOS, VOCAB_SIZE, build_processor, tiny_config, tiny_model
from PIL import Image

from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor


# Before vLLM is imported
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

VOCO = 3  # in the tokenizer of `build_processor`
# A head size that vLLM's attention has on CPUs
TEXT = {"hidden_size": 128, "head_dim": 32}
SMALL = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "seed": 0}


@contextmanager
def running(model: str | Path, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, and nothing of it afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LLM(str(model), **{**SMALL, **options})
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


def servable_config(*classes: type, text: dict[str, Any] | None = None, **overrides: Any) -> VoCoLlamaConfig:
    """[`tiny_config`] that fits the tokenizer, and vLLM on CPUs."""
    return tiny_config(*classes, text={**TEXT, **(text or {})}, voco_token_id=VOCO, **overrides)


def save_tiny(folder: Path, config: VoCoLlamaConfig, **options: Any) -> VoCoLlamaForConditionalGeneration:
    """A random model with its processor, as a checkpoint."""
    model = tiny_model(config=config)
    model.save_pretrained(folder, **options)
    build_processor(config.base_model_type).save_pretrained(folder)
    return model


def random_images(number: int, size: int = 28, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)) for _ in range(number)]


def random_prompts(number: int, images: list[Image.Image], max_k: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts in tokens: text and images in any order, or text alone; one of a few images stands in many of them."""
    rng = np.random.default_rng(seed)
    prompts = []
    for _ in range(number):
        kinds = rng.permutation([True] * rng.integers(0, 4) + [False] * rng.integers(1, 4))
        chosen: list[Image.Image] = []
        ids: list[int] = [] if kinds[0] else [BOS]
        for is_image in kinds:
            if is_image:
                chosen.append(images[rng.integers(len(images))])
                ids.append(VOCO)
            else:
                ids += rng.integers(VOCO + 1, VOCAB_SIZE, rng.integers(1, 30)).tolist()
        count = int(rng.integers(1, max_k + 1))
        prompts.append({"prompt_token_ids": ids, "images": chosen, "k": count})
    return prompts


def for_vllm(prompt: dict[str, Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt_token_ids": list(prompt["prompt_token_ids"])}
    if prompt["images"]:
        asked["multi_modal_data"] = {"image": list(prompt["images"])}
        asked["mm_processor_kwargs"] = {"num_voco_tokens": prompt["k"]}
    return asked


def answer(engine: Any, prompts: list[Any], max_tokens: int = 8) -> list[list[int]]:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = engine.generate(prompts, greedy, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reference(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    prompt: dict[str, Any],
    max_tokens: int = 8,
) -> list[int]:
    """What `generate` answers."""
    ids = [own for token in prompt["prompt_token_ids"] for own in [token] * (prompt["k"] if token == VOCO else 1)]
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
    if prompt["images"]:
        pixels = processor(images=prompt["images"], return_tensors="pt")["pixel_values"]
        inputs |= {"pixel_values": pixels, "num_voco_tokens": prompt["k"]}
    output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return output[0, len(ids) :].tolist()
