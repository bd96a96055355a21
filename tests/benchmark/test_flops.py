"""Costs at the size of the paper's model, exact and without its weights."""

import pytest
import torch

from voco_llama_hf.benchmark.flops import count_compression, count_costs, make_meta_networks
from voco_llama_hf.benchmark.presets import PRESETS, build_model, tiny
from voco_llama_hf.benchmark.question import (
    FULL_CACHE,
    LIMIT,
    NO_CACHE,
    VOCO_CACHE,
    WAYS,
    Question,
    fresh,
    make_networks,
)


@pytest.fixture(scope="module")
def networks():
    return make_meta_networks(PRESETS["llava-1.5-7b"](), torch.bfloat16)


@pytest.fixture(scope="module")
def costs(networks):
    return count_costs(networks, 1, 128)


def test_vicuna_keeps_half_a_mebibyte_a_token(costs):
    assert costs[VOCO_CACHE].cache_bytes == 2**19
    assert costs[FULL_CACHE].cache_bytes == 576 * 2**19
    assert 1 - costs[VOCO_CACHE].cache_bytes / costs[FULL_CACHE].cache_bytes >= 0.998
    assert costs[NO_CACHE].cache_bytes == costs[LIMIT].cache_bytes == 0


def test_a_question_about_a_compressed_image_costs_what_text_does(costs):
    assert costs[VOCO_CACHE].flops == pytest.approx(costs[LIMIT].flops, rel=0.01)
    assert costs[VOCO_CACHE].flops < costs[FULL_CACHE].flops


def test_flops_of_text_are_two_a_weight_and_token(costs):
    """By hand: the weights of every layer for every token, the head for the last one, and attention."""
    length, hidden, layers = 129, 4096, 32
    weights = layers * (4 * hidden**2 + 3 * hidden * 11008)
    attention = layers * 2 * 2 * length**2 * hidden
    assert costs[LIMIT].flops == 2 * weights * length + 2 * hidden * 32064 + attention


def test_pixels_cost_the_vision_tower_and_all_vision_tokens(costs):
    assert costs[NO_CACHE].flops > (577 + 128) / 129 * costs[LIMIT].flops


def test_a_short_question_saves_what_the_paper_reports(networks):
    """Table 7: 94.8 %, with 9.6 T without a cache and 0.5 T with that of one VoCo token."""
    costs = count_costs(networks, 1, 32)
    assert 1 - costs[VOCO_CACHE].flops / costs[NO_CACHE].flops >= 0.948


def test_images_in_front_of_the_question_are_not_computed_again(networks):
    """A thousand of them add what the question's attention reads, and nothing else."""
    one, many = (count_costs(networks, 1, 64, num_images=number)[VOCO_CACHE] for number in (16, 1016))
    assert many.flops - one.flops == pytest.approx(32 * 2 * 2 * 64 * 1000 * 4096, rel=1e-3)
    assert many.cache_bytes == 1016 * 2**19


def test_compression_costs_its_passes(networks):
    flops, bare = count_compression(networks, 1)
    assert bare < flops <= 1.01 * bare


def test_grouped_queries_keep_a_quarter():
    costs = count_costs(make_meta_networks(PRESETS["llama-3-8b"](), torch.bfloat16), 2, 64)
    assert costs[VOCO_CACHE].cache_bytes == 2 * 2**17


def test_a_large_image_costs_as_little_to_ask_about_as_a_small_one(networks):
    large = make_meta_networks(PRESETS["llava-next-7b"](), torch.bfloat16)
    costs, small = count_costs(large, 1, 64), count_costs(networks, 1, 64)
    assert costs[VOCO_CACHE] == small[VOCO_CACHE]
    assert costs[FULL_CACHE].cache_bytes == 2928 * 2**19
    flops, bare = count_compression(large, 1)
    assert bare < flops <= 1.01 * bare


@torch.no_grad()
def test_counted_bytes_are_those_of_a_real_cache():
    model = build_model(tiny(), "cpu", torch.float32)
    size = model.config.vision_config.image_size
    cache = model.compress(torch.randn(3, 3, size, size), 2)
    networks = make_meta_networks(tiny(), torch.float32)
    assert count_costs(networks, 2, 8, num_images=3)[VOCO_CACHE].cache_bytes == cache.nbytes


@pytest.mark.parametrize("way", WAYS)
def test_a_question_can_be_asked_again(way):
    """Calls that are timed add no tokens to what the next one finds."""
    networks = make_networks(build_model(tiny(), "cpu", torch.float32))
    inputs, network = Question(networks, 2, 128, batch_size=2).inputs(way), networks[way]
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first, second = (network.generate(**fresh(inputs), **options) for _ in range(2))
    assert torch.equal(first, second)
