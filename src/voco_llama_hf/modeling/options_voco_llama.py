"""Keyword arguments of the processor: what there are, and who takes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import validate_typed_dict
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs, TextKwargs
from transformers.utils import logging


if TYPE_CHECKING:
    from .processing_voco_llama import VoCoLlamaProcessor

logger = logging.get_logger(__name__)

OWN = ("num_voco_tokens", "num_voco_tokens_per_tile", "num_tiles")
SAMPLING = ("num_frames", "fps", "do_sample_frames")


class VoCoLlamaImagesKwargs(ImagesKwargs, total=False):
    """
    num_voco_tokens (`int` or `list[int]`, *optional*):
        VoCo tokens of every image, or of each.
    num_voco_tokens_per_tile (`int`, *optional*):
        VoCo tokens of every tile, instead.
    num_tiles (`int` or `list[int]`, *optional*):
        Tiles that each image of a `voco_cache` was compressed in.
    """

    num_voco_tokens: int | list[int] | None
    num_voco_tokens_per_tile: int | None
    num_tiles: int | list[int] | None


class VoCoLlamaProcessorKwargs(ProcessingKwargs, TextKwargs, VoCoLlamaImagesKwargs, total=False):  # type: ignore[misc]
    """
    num_frames (`int` or `list[int]`, *optional*), fps (`float`, *optional*), do_sample_frames (`bool`, *optional*):
        Which frames of videos are taken.
    return_num_voco_tokens (`bool`, *optional*):
        Whether the output says how many VoCo tokens each image has; by default what the processor's attribute of this
        name says.
    """

    images_kwargs: VoCoLlamaImagesKwargs  # type: ignore[misc]
    num_frames: int | list[int] | None
    fps: float | None
    do_sample_frames: bool | None
    return_num_voco_tokens: bool | None

    _defaults = {}  # type: ignore[misc]  # noqa: RUF012  # transformers before 5.23 reads it


@dataclass
class ProcessorOptions:
    """The keyword arguments of a call, by who takes them."""

    text: dict[str, Any]
    images: dict[str, Any]
    sampling: dict[str, Any]
    num_voco_tokens: int | list[int] | None
    num_voco_tokens_per_tile: int | None
    num_tiles: int | list[int] | None
    return_num_voco_tokens: bool | None
    return_text_replacement_offsets: bool
    return_mm_token_type_ids: bool
    return_tensors: str | None

    @property
    def numbers(self) -> int | list[int] | None:
        """VoCo tokens of every image, or of each, where a tile may be one."""
        return self.num_voco_tokens if self.num_voco_tokens_per_tile is None else self.num_voco_tokens_per_tile

    @classmethod
    def sort(cls, kwargs: Mapping[str, Any], processor: "VoCoLlamaProcessor") -> "ProcessorOptions":
        """
        As transformers sorts them: flat, as `text_kwargs`, `images_kwargs` and `videos_kwargs`, or as `common_kwargs`;
        what nobody takes is warned of.

        Raises:
            ValueError: if one is given twice, two exclude each other, or there is audio.
        """
        flat = dict(kwargs)
        if flat.pop("audio", None) is not None:
            raise ValueError("there is no audio in this model: pass text, images and videos")
        tokenizer, image_processor = processor.tokenizer, processor.image_processor
        names = {
            "text": set(TextKwargs.__annotations__),
            "images": {*VoCoLlamaImagesKwargs.__annotations__, *image_processor.valid_kwargs.__annotations__},
            "videos": set(SAMPLING),
        }
        parts = {part: dict(flat.pop(f"{part}_kwargs", None) or {}) for part in (*names, "audio")}
        common = flat.pop("common_kwargs", None) or {}
        return_num_voco_tokens = flat.pop("return_num_voco_tokens", None)
        for part, known in names.items():
            if twice := parts[part].keys() & flat.keys() & known:
                raise ValueError(f"{', '.join(sorted(twice))} is passed twice: by itself and in {part}_kwargs")
            given = {name: value for name, value in flat.items() if name in known}
            parts[part] = {**common, **given, **parts[part]} if part != "videos" else {**given, **parts[part]}
        for name in flat.keys() - set.union(*names.values()):
            logger.warning_once(f"`{name}` is no keyword argument of {type(processor).__name__}, and is ignored.")
        stored = {name: value for name, value in tokenizer.init_kwargs.items() if name in names["text"]}
        text = {**{name: getattr(tokenizer, name, value) for name, value in stored.items()}, **parts["text"]}
        images = parts["images"]
        validate_typed_dict(TextKwargs, text)  # type: ignore[type-var]
        numbers = {name: images.pop(name, None) for name in OWN}
        validate_typed_dict(VoCoLlamaImagesKwargs, numbers)  # type: ignore[type-var]
        if numbers["num_voco_tokens"] is not None and numbers["num_voco_tokens_per_tile"] is not None:
            raise ValueError("pass num_voco_tokens of an image, or num_voco_tokens_per_tile, not both")
        return cls(
            return_text_replacement_offsets=bool(text.pop("return_text_replacement_offsets", False)),
            return_mm_token_type_ids=bool(text.pop("return_mm_token_type_ids", False)),
            return_tensors=text.pop("return_tensors", None) or images.get("return_tensors"),
            text=text,
            images=images,
            sampling={name: value for name, value in parts["videos"].items() if name in SAMPLING},
            **numbers,
            return_num_voco_tokens=return_num_voco_tokens,
        )


__all__ = ["ProcessorOptions", "VoCoLlamaImagesKwargs", "VoCoLlamaProcessorKwargs"]
