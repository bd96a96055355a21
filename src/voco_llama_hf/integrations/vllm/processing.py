"""Images of a request as the model takes them, and the tokens that stand for them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
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
from ...modeling.tiled_processing_voco_llama import check_grid
from ...modeling.tiles_voco_llama import FRAME, read_sizes
from ...pictures import choose_number, name_number
from ...vision_tokens import count_image_tiles, count_vision_tokens, largest_size
from .limits import check_segment, max_num_voco_tokens
from .stored_images import ServedModel, StoreReader


OPTION = "num_voco_tokens"
PER_TILE = "num_voco_tokens_per_tile"
OPTIONS = (OPTION, PER_TILE)
SIZES = "image_sizes"


@dataclass(frozen=True)
class Frame:
    """A frame of a video, which is not divided into tiles."""

    picture: Any  # an array or a tensor


class ImageItems(ProcessorBatchItems[Any]):
    """Images of a request: pixels in any form, a [`Frame`], a [`VoCoCache`] of one image, or only an identifier."""

    def __init__(self, data: Sequence[Any]):
        super().__init__(data, "image")

    def get(self, index: int) -> Any:
        # With the bytes of its file, where there is one
        return self.data[index]

    def get_item_for_hash(self, index: int) -> object:
        item = self.data[index]
        if isinstance(item, VoCoCache):
            return "voco_cache", item.keys, item.values
        return ("frame", item.picture) if isinstance(item, Frame) else item


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
        check_grid(processor.image_processor, self.get_hf_config().image_grid_pinpoints)
        return processor

    def get_data_parser(self) -> MultiModalDataParser:
        return VoCoLlamaDataParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        # A video is its frames, each an image, of which the renderer makes an item
        super().validate_num_items("image" if modality == "video" else modality, num_items)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.max_num_voco_tokens}

    @cached_property
    def served_model(self) -> ServedModel:
        return ServedModel(self.ctx.model_config)

    @cached_property
    def max_num_voco_tokens(self) -> int:
        return max_num_voco_tokens(self.ctx.model_config)

    def number(self, options: Mapping[str, object]) -> tuple[str, int]:
        """
        VoCo tokens of the images of a request, or of their tiles, behind the name of the option that says which.

        Raises:
            ValueError: if there are other options than these two, or both, or it is no number in range.
        """
        merged = self.ctx.get_mm_config().merge_mm_processor_kwargs(options)
        if unknown := sorted(set(merged) - set(OPTIONS)):
            raise ValueError(f"mm_processor_kwargs has {', '.join(unknown)}: only {' and '.join(OPTIONS)} are taken")
        # A request that says one of them does not mean the other, which the server may have been started with
        given = named(options) or named(merged) or name_number(*choose_number(self.get_hf_processor()))
        if len(given) > 1:
            raise ValueError(f"pass {OPTION} of an image, or {PER_TILE}, not both")
        ((name, count),) = given.items()
        if name == PER_TILE and self.get_hf_config().image_grid_pinpoints is None:
            raise ValueError(f"{PER_TILE} needs a model that divides images into tiles")
        limit = self.max_num_voco_tokens
        if type(count) is not int or not 1 <= count <= limit:
            raise ValueError(f"{name} must be one number from 1 to {limit} for all images, got {count!r:.80}")
        return name, count


class VoCoLlamaDummyInputsBuilder(BaseDummyInputsBuilder[VoCoLlamaProcessingInfo]):
    """Images by which vLLM measures the memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().voco_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, MultiModalDummyOptions]
    ) -> MultiModalDataDict:
        height, width = costliest_size(self.info.get_hf_config())
        number = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=number)}


class VoCoLlamaMultiModalProcessor(BaseMultiModalProcessor[VoCoLlamaProcessingInfo]):
    """In a prompt of the renderer every image is one `<voco>`; here it becomes k of them."""

    _store: StoreReader | None = None

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        inputs = super().get_dummy_inputs(*args, **kwargs)
        inputs.hf_processor_mm_kwargs = {OPTION: self.info.max_num_voco_tokens}
        return inputs

    def read_from(self, store: StoreReader) -> None:
        """Looks for the images of requests in a store first."""
        self._store = store

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        name, count = self.info.number(inputs.hf_processor_mm_kwargs)
        if "image" in inputs.mm_data_items:
            at_end = bool(inputs.prompt) and inputs.prompt[-1] == self.info.get_hf_config().voco_token_id
            if self._store is not None:
                find = partial(self._store.find, num_voco_tokens=count, per_tile=name == PER_TILE)
                inputs = self._with_stored(inputs, find, at_end)
            check_stored(list(inputs.mm_data_items["image"].get_all()), inputs.hf_processor_mm_kwargs, at_end)
        return super().apply(inputs, timing_ctx)

    def _with_stored(
        self, inputs: ProcessorInputs, find: Callable[[str], VoCoCache | None], at_end: bool
    ) -> ProcessorInputs:
        """Images that the store has, by the hash of their file, or named by it alone, as compressed ones."""
        items = inputs.mm_data_items["image"].get_all()
        names = list((inputs.mm_uuid_items or {}).get("image", [None] * len(items)))
        for index, item in enumerate(items):
            content_hash = names[index] if item is None else hash_of(item)
            # What follows an image at the end is read from its hidden state, which a store does not have
            is_last = at_end and index == len(items) - 1
            if content_hash is None or (is_last and item is not None):
                continue
            if (stored := find(content_hash)) is not None:
                items[index], names[index] = stored, None
        data, uuids = MultiModalDataItems(image=ImageItems(items)), {"image": names}
        return replace(inputs, mm_data_items=data, mm_uuid_items=uuids)

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        name, count = self.info.number(hf_kwargs)
        made = [
            self._from_cache(image) if isinstance(image, VoCoCache) else self._from_pixels(image, name, count)
            for image in hf_data["images"]
        ]
        fields = ["pixel_values", "stored_rows", OPTION]
        if self.info.get_hf_config().image_grid_pinpoints is not None:
            fields.append(SIZES)
        return BatchFeature({field: [own[field] for own in made] for field in fields})

    def _from_cache(self, image: VoCoCache) -> dict[str, torch.Tensor]:
        dtype = self.info.ctx.model_config.dtype
        return {
            "pixel_values": torch.empty(0, dtype=dtype),
            "stored_rows": self.info.served_model.rows(image).to(dtype),
            OPTION: torch.tensor(sum(image.token_counts)),
            SIZES: torch.empty(0, 2, dtype=torch.long),
        }

    def _from_pixels(self, image: Any, name: str, count: int) -> dict[str, torch.Tensor]:
        """An image by itself, so that it has its own number of tiles."""
        config, dtype = self.info.get_hf_config(), self.info.ctx.model_config.dtype
        given = {"videos": [[image.picture]]} if isinstance(image, Frame) else {"images": [picture_of(image)]}
        made = self.info.get_hf_processor()(**given, **{name: count}, return_tensors="pt")
        number, sizes = int(made[OPTION].sum()), made.get(SIZES, torch.tensor([FRAME]))
        if number > self.info.max_num_voco_tokens:
            raise ValueError(
                f"{name}={count} makes {number} VoCo tokens of an image of {len(sizes)} tiles: it can have "
                f"{self.info.max_num_voco_tokens}"
            )
        if name == OPTION and SIZES in made:
            ((height, width),) = read_sizes(sizes)
            vision_tokens = count_vision_tokens(config, (height, width))
            check_segment(config, vision_tokens, number, f"an image of {width}x{height}")
        layers, heads, head_dim = key_value_shape(config.text_config)
        return {
            "pixel_values": made["pixel_values"].to(dtype),
            "stored_rows": torch.empty(0, 2 * layers * heads * head_dim, dtype=dtype),
            OPTION: torch.tensor(number),
            SIZES: sizes,
        }

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "stored_rows": MultiModalFieldConfig.batched("image"),
            OPTION: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            SIZES: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
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


def costliest_size(config: Any) -> tuple[int, int]:
    """Height and width of the image that takes most memory: the vision tower reads all of its tiles at once."""
    if config.image_grid_pinpoints is None:
        return largest_size(config)
    sizes = [(height, width) for height, width in config.image_grid_pinpoints]
    return max(sizes, key=lambda size: (count_image_tiles(config, size), count_vision_tokens(config, size)))


def named(options: Mapping[str, object]) -> dict[str, object]:
    """Those of our options that say something."""
    return {name: options[name] for name in OPTIONS if options.get(name) is not None}


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
    for name, asked in named(options).items():
        for image in images:
            if isinstance(image, VoCoCache) and asked != image.num_voco_tokens:
                raise ValueError(f"{name}={asked} was asked of an image that has {image.num_voco_tokens} VoCo tokens")
    if at_end and isinstance(images[-1], VoCoCache):
        raise ValueError(
            "a prompt cannot end with a compressed image, whose last hidden state is not stored: write text behind it"
        )
