"""One question about images, asked in the four ways that are compared."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from ..llava import as_llava
from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration
from ..modeling.configuration_voco_llama import key_value_shape
from ..pictures import random_pictures
from ..vision_tokens import count_vision_tokens


NO_CACHE, FULL_CACHE, VOCO_CACHE, LIMIT = "no cache", "full cache", "VoCo cache", "text only"
WAYS = (NO_CACHE, FULL_CACHE, VOCO_CACHE, LIMIT)


def make_networks(model: VoCoLlamaForConditionalGeneration) -> dict[str, Any]:
    """The model that is asked, by way of asking. All of them share the weights of one."""
    llava = as_llava(model)
    return {NO_CACHE: llava, FULL_CACHE: llava, VOCO_CACHE: model, LIMIT: as_text_model(model)}


def as_text_model(model: VoCoLlamaForConditionalGeneration) -> PreTrainedModel:
    """The language model alone, as transformers has it."""
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(model.config.text_config)
    text_model.model = model.model.language_model
    text_model.lm_head = model.lm_head
    text_model.generation_config = model.generation_config
    return text_model.eval()


@dataclass
class Question:
    """
    A prompt of random text behind images, for each way of asking.

    Args:
        networks (`dict[str, PreTrainedModel]`):
            What [`make_networks`] returned.
        num_voco_tokens, prompt_tokens (`int`):
            Tokens an image, and of text.
        batch_size (`int`, *optional*, defaults to 1):
            Rows, each with images of its own.
        num_images (`int`, *optional*, defaults to 1):
            Images of a row.
    """

    networks: dict[str, Any]
    num_voco_tokens: int
    prompt_tokens: int
    batch_size: int = 1
    num_images: int = 1

    @property
    def model(self) -> VoCoLlamaForConditionalGeneration:
        return self.networks[VOCO_CACHE]

    def inputs(self, way: str) -> dict[str, Any]:
        """
        What `generate` takes. Images are compressed, or in the cache, already; what they hold does not change the cost
        and is random. Token ids are on the CPU.
        """
        image_tokens = (
            self.num_images
            * {
                NO_CACHE: count_vision_tokens(self.model.config),
                FULL_CACHE: 0,
                VOCO_CACHE: self.num_voco_tokens,
                LIMIT: self.num_voco_tokens,
            }[way]
        )
        prefix = self.model.config.vision_prefix_token_ids if way == NO_CACHE else []
        voco = self.model.config.voco_token_id
        ordinary = 4 if voco == 3 else 3
        text = torch.randint(3, 100, (self.batch_size, self.prompt_tokens), generator=torch.Generator().manual_seed(0))
        rows = [
            torch.tensor(prefix, dtype=torch.long).expand(self.batch_size, -1),
            torch.full((self.batch_size, image_tokens), ordinary if way == LIMIT else voco),
            text.masked_fill(text == voco, ordinary),
        ]
        inputs: dict[str, Any] = {"input_ids": torch.cat(rows, dim=1)}
        if way == NO_CACHE:
            inputs |= random_pictures(self.model, self.batch_size * self.num_images)
        elif way == FULL_CACHE:
            inputs["past_key_values"] = self._full_cache()
        elif way == VOCO_CACHE:
            inputs["voco_cache"] = self._voco_cache()
        past = inputs["past_key_values"].get_seq_length() if way == FULL_CACHE else 0
        inputs["attention_mask"] = torch.ones(self.batch_size, past + inputs["input_ids"].shape[1], dtype=torch.long)
        return inputs

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.model.device, dtype=self.model.dtype)

    def _voco_cache(self) -> VoCoCache:
        counts = [self.num_voco_tokens] * (self.batch_size * self.num_images)
        shape = (sum(counts), *key_value_shape(self.model.config.text_config))
        return VoCoCache(self._random(*shape), self._random(*shape), counts, self.model.fingerprint())

    def _full_cache(self) -> Cache:
        layers, heads, head_dim = key_value_shape(self.model.config.text_config)
        prefix = len(self.model.config.vision_prefix_token_ids)
        length = prefix + self.num_images * count_vision_tokens(self.model.config)
        cache = DynamicCache(config=self.model.config.text_config)
        for layer in range(layers):
            shape = (self.batch_size, heads, length, head_dim)
            cache.update(self._random(*shape), self._random(*shape), layer)
        return cache


def fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for one call, which may add tokens to a cache without changing what the next call finds there."""
    if "past_key_values" not in inputs:
        return inputs
    cache = copy.copy(inputs["past_key_values"])
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return {**inputs, "past_key_values": cache}
