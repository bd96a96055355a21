"""Compressed images on their way to a server; nothing here needs vLLM."""

import base64
import io

import numpy as np
import pytest
import torch
from modeling.helpers import random_pixels, tiny_model

from voco_llama_hf import VoCoCache
from voco_llama_hf.integrations.vllm import image_part
from voco_llama_hf.integrations.vllm.stored_images import read_sent


@pytest.fixture(scope="module")
def cache() -> VoCoCache:
    model = tiny_model()
    return model.compress(random_pixels(model, 2), num_voco_tokens=3)


def sent(part: dict) -> torch.Tensor:
    """As vLLM reads it."""
    assert part["type"] == "image_embeds"
    return torch.from_numpy(np.load(io.BytesIO(base64.b64decode(part["image_embeds"]))))


def test_a_cache_arrives_as_it_was(cache, tmp_path):
    cache.save(tmp_path / "cache.safetensors")
    for given in (cache, tmp_path / "cache.safetensors", str(tmp_path / "cache.safetensors")):
        arrived = read_sent(sent(image_part(given)))
        assert torch.equal(arrived.keys, cache.keys) and torch.equal(arrived.values, cache.values)
        assert arrived.token_counts == [3, 3] and arrived.fingerprint == cache.fingerprint


def test_what_is_no_cache_is_refused(cache):
    content = sent(image_part(cache))
    damaged = content.clone()
    damaged[0, -1] ^= 1
    for wrong in (damaged, content[:, :100], torch.zeros(1, 0, dtype=torch.uint8), content[0], content.float()):
        with pytest.raises(ValueError, match="image_embeds"):
            read_sent(wrong)
