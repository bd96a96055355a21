"""vLLM answers as `generate` does, token for token."""

import pytest
from modeling.helpers import build_processor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SiglipVisionConfig


pytest.importorskip("vllm.version")  # `vllm` alone is this folder too

from integrations.vllm.engines import (
    answer,
    for_vllm,
    random_images,
    random_prompts,
    reference,
    running,
    save_tiny,
    servable_config,
)


SCALED = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {**SCALED, "rope_type": "yarn"}
CONFIGS = {
    "llama": servable_config(LlamaConfig, tie_word_embeddings=True),
    "llama3": servable_config(LlamaConfig, text={"rope_parameters": LLAMA3}),
    "yarn": servable_config(LlamaConfig, text={"rope_parameters": YARN}),
    "mistral": servable_config(MistralConfig, text={"sliding_window": 48}),
    "qwen2": servable_config(Qwen2Config),
    "qwen3": servable_config(Qwen3Config, SiglipVisionConfig, vision_feature_select_strategy="full"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_random_prompts(name, tmp_path):
    """Chunked prefill in small pieces, with the prefix cache; asked again, everything is known."""
    # One of them with the names that LLaVA's older classes gave to weights
    model = save_tiny(tmp_path, CONFIGS[name], save_original_format=name == "mistral")
    processor = build_processor()
    prompts = random_prompts(16, random_images(4), max_k=40)
    expected = [reference(model, processor, prompt) for prompt in prompts]
    with running(tmp_path, max_num_batched_tokens=32, max_model_len=400) as engine:
        for _ in range(2):
            answers = answer(engine, [for_vllm(prompt) for prompt in prompts])
            assert answers == expected
