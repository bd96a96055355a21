"""Exact costs, counted on shapes: no weights are needed, so a model of any size fits any machine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from ..modeling.configuration_voco_llama import cache_bytes
from ..pictures import random_pictures
from ..vision_tokens import count_vision_tokens
from .presets import build_model
from .question import FULL_CACHE, VOCO_CACHE, WAYS, Question, fresh, make_networks


@dataclass(frozen=True)
class Cost:
    """
    Args:
        flops (`int`): Floating point operations until the first token, two a multiply-add.
        cache_bytes (`int`): Bytes that are kept of the image between questions.
    """

    flops: int
    cache_bytes: int


def make_meta_networks(config: VoCoLlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Networks of shapes only that take token ids on the CPU, from which they read where images stand."""
    model = build_model(config, "meta", dtype)
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: (args[0].to("meta"),))
    return make_networks(model)


@torch.no_grad()
def count_costs(
    networks: dict[str, Any], num_voco_tokens: int, prompt_tokens: int, num_images: int = 1
) -> dict[str, Cost]:
    """Cost of a question, by way of asking; `networks` are those of [`make_meta_networks`]."""
    question = Question(networks, num_voco_tokens, prompt_tokens, num_images=num_images)
    config = question.model.config
    kept_tokens = {FULL_CACHE: count_vision_tokens(config), VOCO_CACHE: num_voco_tokens}
    costs = {}
    for way in WAYS:
        inputs = fresh(question.inputs(way))
        del inputs["attention_mask"]  # nothing is padded
        with FlopCounterMode(display=False) as counter:
            networks[way](**inputs, use_cache=True, logits_to_keep=1)
        kept = cache_bytes(config, num_images * kept_tokens.get(way, 0), question.model.dtype)
        costs[way] = Cost(counter.get_total_flops(), kept)
    return costs


@torch.no_grad()
def count_compression(networks: dict[str, Any], num_voco_tokens: int) -> tuple[int, int]:
    """FLOPs to compress an image, and those of vision tower and one causal pass over V + k tokens."""
    model = networks[VOCO_CACHE]
    pictures = random_pictures(model, 1)
    with FlopCounterMode(display=False) as counter:
        model.compress(**pictures, num_voco_tokens=num_voco_tokens)
    with FlopCounterMode(display=False) as bare:
        # Without a cache transformers looks at positions, which have no values here
        run_bare_passes(model, pictures, num_voco_tokens, use_cache=True)
    return counter.get_total_flops(), bare.get_total_flops()


@torch.no_grad()
def run_bare_passes(
    model: VoCoLlamaForConditionalGeneration,
    pictures: dict[str, torch.Tensor],
    num_voco_tokens: int,
    use_cache: bool = False,
) -> None:
    """What compressing cannot do without: vision tower, projector, and one causal pass over V + k tokens."""
    found = model.model.get_vision_features(**pictures)
    vision = found if isinstance(found, torch.Tensor) else torch.stack(found)
    voco = vision.new_zeros(len(vision), num_voco_tokens, vision.shape[-1])
    model.model.language_model(inputs_embeds=torch.cat([vision, voco], dim=1), use_cache=use_cache)
