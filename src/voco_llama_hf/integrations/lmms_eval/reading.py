"""Ways to read the images of a batch of prompts: from VoCo tokens, or from all vision tokens."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from transformers import BatchFeature, PreTrainedModel

from ...llava import as_llava
from ...modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ...prompts import starts_with_bos
from ...serving.image_cache import ImageCache
from .visuals import Visual


AttentionMode = Literal["voco", "causal", "uncompressed"]


@dataclass(frozen=True)
class Encoded:
    """
    A batch as a model takes it.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Prompts with their `<voco>` tokens, padded on the left.
        inputs (`dict`):
            What `generate` and `forward` take.
        num_returned (`int`):
            Tokens of a prompt that `generate` returns in front of the answer.
        length (`int`):
            Positions that the longest prompt takes.
    """

    input_ids: torch.Tensor
    inputs: dict[str, Any]
    num_returned: int
    length: int


class Reading(ABC):
    """
    One way to read images.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Model that reads.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        num_voco_tokens (`int`): VoCo tokens of an image or a frame.
    """

    def __init__(
        self, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, num_voco_tokens: int = 1
    ):
        self.model, self.processor, self.num_voco_tokens = model, processor, num_voco_tokens
        self.network: PreTrainedModel = model  # what takes the inputs of a batch
        self.num_read = 0  # images and frames that the vision tower has seen
        self.num_reused = 0  # and those that it need not have seen again

    @abstractmethod
    def encode(self, prompts: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> Encoded:
        """
        A batch of prompts with `<image>` and `<video>` tokens, and what they stand for.

        Args:
            prompts (`Sequence[str]`): Prompts as the chat template has them.
            visuals (`Sequence[Sequence[Visual]]`): What each shows, in order.
        """

    def process(self, prompts: Sequence[str], **shown: Any) -> BatchFeature:
        """Prompts through the processor, with what they show."""
        # Either a template writes the BOS token wherever there is to be one, or it leaves that to the tokenizer
        add_special_tokens = not any(starts_with_bos(prompt, self.processor) for prompt in prompts)
        return self.processor(
            text=list(prompts),
            padding=True,
            padding_side="left",
            add_special_tokens=add_special_tokens,
            return_tensors="pt",
            **shown,
        ).to(self.model.device, self.model.dtype)

    def pixels(self, visuals: Sequence[Visual]) -> BatchFeature:
        """Images, or else videos, as the vision tower takes them."""
        pictures = [visual.load() for visual in visuals]
        shown: dict[str, Any] = {"videos": pictures}
        if visuals[0].kind != "video":
            shown = {"images": [picture for group in pictures for picture in group]}
        processed = self.processor(
            **shown,
            num_voco_tokens=self.num_voco_tokens,  # a model may be asked for whole images that divides them by default
            return_num_voco_tokens=False,
            return_tensors="pt",
        )
        self.num_read += len(processed["pixel_values"])
        return processed.to(self.model.device, self.model.dtype)


class CompressedReading(Reading):
    """
    Reads images from VoCo tokens; one that many questions share is compressed once.

    Args:
        memory ([`~voco_llama_hf.serving.ImageCache`]): What was compressed before.
    """

    def __init__(
        self,
        model: VoCoLlamaForConditionalGeneration,
        processor: VoCoLlamaProcessor,
        num_voco_tokens: int,
        memory: ImageCache,
    ):
        super().__init__(model, processor, num_voco_tokens)
        self.memory = memory

    def encode(self, prompts: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> Encoded:
        shown = [visual for row in visuals for visual in row]
        images: dict[str, Any] = {}
        inputs = {}
        if shown:
            compressed = self._compress(shown)
            cache = VoCoCache.cat([compressed[visual.key] for visual in shown]).to(self.model.device)
            frames = [len(compressed[visual.key]) for visual in shown if visual.kind == "video"]
            inputs = {"voco_cache": cache}
            images = {**inputs, **({"num_frames": frames} if frames else {})}
        batch = self.process(prompts, **images)
        inputs |= {name: batch[name] for name in ("input_ids", "attention_mask")}
        length = batch["input_ids"].shape[1]
        return Encoded(batch["input_ids"], inputs, num_returned=length, length=length)

    def _compress(self, visuals: Sequence[Visual]) -> dict[str, VoCoCache]:
        """Entries by key, those that are not known yet compressed together."""
        unique = {visual.key: visual for visual in visuals}
        known = {key: self.memory.get(key, self.num_voco_tokens) for key in unique}
        entries = {key: cache for key, cache in known.items() if cache is not None}
        new = [visual for key, visual in unique.items() if key not in entries]
        for group in alike(new):
            # Nothing changes the weights of a model that is evaluated
            made = self.model.compress(
                **self.pixels(group), num_voco_tokens=self.num_voco_tokens, show_progress=False, exact=False
            )
            size = len(made) // len(group)
            entries |= {visual.key: made[i * size : (i + 1) * size] for i, visual in enumerate(group)}
        for visual in new:
            self.memory.get_or_compress(visual.key, self.num_voco_tokens, partial(entries.__getitem__, visual.key))
        num_new = sum(len(entries[visual.key]) for visual in new)
        self.num_reused += sum(len(entries[visual.key]) for visual in visuals) - num_new
        return entries


class FullReading(Reading):
    """
    Reads images from all their vision tokens, as they stand in the long sequence.

    Args:
        attention_mode (`str`): `"uncompressed"`, or `"causal"`: VoCo tokens behind them, and nothing hidden.
    """

    def __init__(
        self,
        model: VoCoLlamaForConditionalGeneration,
        processor: VoCoLlamaProcessor,
        num_voco_tokens: int = 1,
        attention_mode: AttentionMode = "uncompressed",
    ):
        super().__init__(model, processor, num_voco_tokens if attention_mode == "causal" else 1)
        self.attention_mode = attention_mode
        # A long sequence is a LLaVA's: the model itself would ask for the images of its <voco> tokens
        self.network = as_llava(model)

    def encode(self, prompts: Sequence[str], visuals: Sequence[Sequence[Visual]]) -> Encoded:
        shown = [visual for row in visuals for visual in row]
        features, counts = self._features(shown)
        images: dict[str, Any] = {}
        if shown:
            # Only how many there are: their pixels have been seen
            frames = [count for visual, count in zip(shown, counts) if visual.kind == "video"]
            placeholder = placeholder_cache(len(features), self.num_voco_tokens)
            images = {"voco_cache": placeholder, **({"num_frames": frames} if frames else {})}
        batch = self.process(prompts, **images)
        remaining = iter(features)
        rows = [
            self._embed(ids[mask.bool()], remaining)
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        length = max(len(row) for row in rows)
        embeds = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        mask = (torch.arange(length, device=embeds.device) >= length - lengths[:, None]).long()
        inputs = {"inputs_embeds": embeds, "attention_mask": mask}
        return Encoded(batch["input_ids"], inputs, num_returned=0, length=length)

    @torch.no_grad()
    def _features(self, shown: Sequence[Visual]) -> tuple[list[torch.Tensor], list[int]]:
        """Vision tokens of every image and frame, each `(V, hidden_size)`, and how many images a visual has."""
        made: dict[str, list[torch.Tensor]] = {}
        for group in alike({visual.key: visual for visual in shown}.values()):
            features = list(self.model.model.get_vision_features(**self.pixels(group)))
            size = len(features) // len(group)
            made |= {visual.key: features[i * size : (i + 1) * size] for i, visual in enumerate(group)}
        features = [feature for visual in shown for feature in made[visual.key]]
        self.num_reused += len(features) - sum(map(len, made.values()))
        return features, [len(made[visual.key]) for visual in shown]

    def _embed(self, ids: torch.Tensor, features: Iterator[torch.Tensor]) -> torch.Tensor:
        """One row of the long sequence."""
        model, config = self.model.model, self.model.config
        prefix = model.embed_ids(config.vision_prefix_token_ids)
        is_voco = ids == config.voco_token_id
        starts = is_voco.nonzero()[:: self.num_voco_tokens, 0].tolist()
        embeds = model.get_input_embeddings()(ids[None])[0]
        parts, last = [], 0
        for start in starts:
            end = start + self.num_voco_tokens
            parts.append(embeds[last:start])
            if self.attention_mode == "causal":
                parts += [prefix, next(features), model.embed_ids(config.vision_suffix_token_ids), embeds[start:end]]
            else:
                # A row that starts with an image has no BOS token of its own
                parts += [*([prefix] if start == 0 else []), next(features)]
            last = end
        return torch.cat([*parts, embeds[last:]])


def make_reading(
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    attention_mode: AttentionMode,
    num_voco_tokens: int,
    max_cache_bytes: int,
) -> Reading:
    """A [`Reading`] by the name of its attention mode."""
    if attention_mode == "voco":
        return CompressedReading(model, processor, num_voco_tokens, ImageCache(max_cache_bytes))
    return FullReading(model, processor, num_voco_tokens, attention_mode)


def alike(visuals: Iterable[Visual]) -> list[list[Visual]]:
    """All images together, which are one picture each, and every video on its own."""
    visuals = list(visuals)
    stills = [visual for visual in visuals if visual.kind == "image"]
    return [*([stills] if stills else []), *([visual] for visual in visuals if visual.kind == "video")]


def placeholder_cache(num_images: int, num_voco_tokens: int) -> VoCoCache:
    """Entries with nothing in them, which the processor counts."""
    nothing = torch.zeros(num_images * num_voco_tokens, 1, 1, 1)
    return VoCoCache(nothing, nothing, [num_voco_tokens] * num_images, {})


__all__ = ["AttentionMode", "CompressedReading", "Encoded", "FullReading", "Reading", "make_reading"]
