"""Images of a request as the model takes them, and the tokens that stand for them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from transformers import BatchFeature
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import (
    ModalityDataItems,
    ModalityDataParser,
    MultiModalDataItems,
    MultiModalDataParser,
    ProcessorBatchItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from ...images import decode_image
from ...modeling import VoCoCache, VoCoLlamaProcessor
from ...modeling.configuration_voco_llama import key_value_shape
from .limits import max_num_voco_tokens
from .stored_images import ServedModel, StoreReader


OPTION = "num_voco_tokens"


class ImageItems(ProcessorBatchItems[Any]):
    """Images of a request: pixels in any form, a [`VoCoCache`] of one image, or nothing but an identifier."""

    def __init__(self, data: Sequence[Any]):
        super().__init__(data, "image")

    def get(self, index: int) -> Any:
        # With the bytes of its file, where there is one
        return self.data[index]

    def get_item_for_hash(self, index: int) -> object:
        item = self.data[index]
        return ("voco_cache", item.keys, item.values) if isinstance(item, VoCoCache) else item


class VoCoLlamaDataParser(MultiModalDataParser):
    """Takes what the renderer hands on."""

    def _get_subparsers(self) -> Mapping[str, ModalityDataParser]:
        return {"image": self._parse_images}

    @staticmethod
    def _parse_images(data: Any) -> ModalityDataItems[Any, Any] | None:
        return None if data is None else ImageItems(data if isinstance(data, list) else [data])


class VoCoLlamaProcessingInfo(BaseProcessingInfo):
    """What is known of the model's images without any of them."""

    def get_hf_processor(self, **kwargs: object) -> VoCoLlamaProcessor:
        # Options of a request are not those of the processor, of which there is one
        return self._hf_processor

    @cached_property
    def _hf_processor(self) -> VoCoLlamaProcessor:
        # With vLLM's tokenizer, which many threads may use
        model, tokenizer = self.ctx.model_config, self.ctx.tokenizer
        processor = VoCoLlamaProcessor.from_pretrained(model.model, revision=model.revision, tokenizer=tokenizer)
        if processor.image_token_id != (expected := self.get_hf_config().voco_token_id):
            raise ValueError(
                f"{processor.voco_token} is token {processor.image_token_id} of the tokenizer, but voco_token_id is "
                f"{expected}"
            )
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        return VoCoLlamaDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        # A video is its frames, each an image, of which the renderer makes an item
        super().validate_num_items("image" if modality == "video" else modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": max_num_voco_tokens(self.ctx.model_config)}

    @cached_property
    def served_model(self) -> ServedModel:
        return ServedModel(self.ctx.model_config)

    def num_voco_tokens(self, options: Mapping[str, object]) -> int:
        """
        VoCo tokens of the images of a request.

        Raises:
            ValueError: if there are other options than this one, or it is no number in range.
        """
        merged = self.ctx.get_mm_config().merge_mm_processor_kwargs(options)
        if unknown := sorted(set(merged) - {OPTION}):
            raise ValueError(f"mm_processor_kwargs has {', '.join(unknown)}: only {OPTION} is taken")
        count = merged.get(OPTION)
        if count is None:
            count = self.get_hf_processor().num_voco_tokens
        limit = max_num_voco_tokens(self.ctx.model_config)
        if type(count) is not int or not 1 <= count <= limit:
            raise ValueError(f"{OPTION} must be one number from 1 to {limit} for all images, got {count!r:.80}")
        return count


class VoCoLlamaDummyInputsBuilder(BaseDummyInputsBuilder[VoCoLlamaProcessingInfo]):
    """Images by which vLLM measures the memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().voco_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        size = self.info.get_hf_config().vision_config.image_size
        number = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=size, height=size, num_images=number)}


class VoCoLlamaMultiModalProcessor(BaseMultiModalProcessor[VoCoLlamaProcessingInfo]):
    """In a prompt of the renderer every image is one `<voco>`; here it becomes k of them."""

    _store: StoreReader | None = None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {OPTION: max_num_voco_tokens(self.info.ctx.model_config)}
        return inputs

    def read_from(self, store: StoreReader) -> None:
        """Looks for the images of requests in a store first."""
        self._store = store

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        count = self.info.num_voco_tokens(inputs.hf_processor_mm_kwargs)
        if "image" in inputs.mm_data_items:
            at_end = bool(inputs.prompt) and inputs.prompt[-1] == self.info.get_hf_config().voco_token_id
            if self._store is not None:
                inputs = self._with_stored(inputs, self._store, count, at_end)
            check_stored(list(inputs.mm_data_items["image"].get_all()), inputs.hf_processor_mm_kwargs, at_end)
        return super().apply(inputs, timing_ctx)

    def _with_stored(self, inputs: ProcessorInputs, store: StoreReader, count: int, at_end: bool) -> ProcessorInputs:
        """Images that the store has, by the hash of their file, or named by it alone, as compressed ones."""
        items = inputs.mm_data_items["image"].get_all()
        names = list((inputs.mm_uuid_items or {}).get("image", [None] * len(items)))
        for index, item in enumerate(items):
            content_hash = names[index] if item is None else hash_of(item)
            # What follows an image at the end is read from its hidden state, which a store does not have
            is_last = at_end and index == len(items) - 1
            if content_hash is None or (is_last and item is not None):
                continue
            if (stored := store.find(content_hash, count)) is not None:
                items[index], names[index] = stored, None
        data, uuids = MultiModalDataItems(image=ImageItems(items)), {"image": names}
        return replace(inputs, mm_data_items=data, mm_uuid_items=uuids)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        count = self.info.num_voco_tokens(hf_kwargs)
        images = hf_data["images"]
        pictures = [image for image in images if not isinstance(image, VoCoCache)]
        dtype = self.info.ctx.model_config.dtype
        pixels = iter(self._pixel_values(pictures).to(dtype)) if pictures else iter(())
        layers, heads, head_dim = key_value_shape(self.info.get_hf_config().text_config)
        no_rows, no_pixels = torch.empty(0, 2 * layers * heads * head_dim, dtype=dtype), torch.empty(0, dtype=dtype)
        is_stored = [isinstance(image, VoCoCache) for image in images]
        rows = [
            self.info.served_model.rows(image).to(dtype) if stored else no_rows
            for image, stored in zip(images, is_stored)
        ]
        return BatchFeature(
            {
                "pixel_values": [no_pixels if stored else next(pixels) for stored in is_stored],
                "stored_rows": rows,
                OPTION: torch.tensor([len(own) if stored else count for own, stored in zip(rows, is_stored)]),
            }
        )

    def _pixel_values(self, pictures: list[Any]) -> torch.Tensor:
        processor = self.info.get_hf_processor()
        return torch.cat(list(processor.iter_pixel_values(map(picture_of, pictures))))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "stored_rows": MultiModalFieldConfig.batched("image"),
            OPTION: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            # What a client sends, which the renderer turns into caches
            "image_embeds": MultiModalFieldConfig.batched("image"),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token = self.info.get_hf_config().voco_token_id

        def tokens_of(index: int) -> list[int]:
            return [token] * int(out_mm_kwargs["image"][index][OPTION].data)

        return [PromptReplacement(modality="image", target=[token], replacement=tokens_of)]


def hash_of(image: Any) -> str | None:
    """SHA-256 of the file that an image came in, by which a store knows it."""
    return hashlib.sha256(image.original_bytes).hexdigest() if isinstance(image, MediaWithBytes) else None


def picture_of(image: Any) -> Any:
    """An image as the processor takes it; a file is read again, as every file here is."""
    if image is None:
        raise ValueError("an image has neither a content nor an identifier that is known here")
    return decode_image(image.original_bytes) if isinstance(image, MediaWithBytes) else image


def check_stored(images: list[Any], options: Mapping[str, object], at_end: bool) -> None:
    """
    Raises:
        ValueError: if compressed images have another k than a request asks for, or one ends the prompt.
    """
    asked = options.get(OPTION)
    for image in images:
        if isinstance(image, VoCoCache) and asked not in (None, image.num_voco_tokens):
            raise ValueError(f"{OPTION}={asked} was asked of an image that has {image.num_voco_tokens} VoCo tokens")
    if at_end and isinstance(images[-1], VoCoCache):
        raise ValueError(
            "a prompt cannot end with a compressed image, whose last hidden state is not stored: write text behind it"
        )
