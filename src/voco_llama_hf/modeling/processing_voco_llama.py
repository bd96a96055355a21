"""Processor of VoCo-LLaMA: images, videos and text to the short sequence."""

from .compat_voco_llama import VERSION  # noqa: F401


# isort: split
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

from .cache_voco_llama import VoCoCache
from .layout_voco_llama import per_image_counts
from .video_voco_llama import load_videos


MAX_VOCO_TOKENS = 576
SAMPLING = ("num_frames", "fps", "do_sample_frames")


def check_num_voco_tokens(counts: list[int]) -> None:
    """
    Raises:
        ValueError: if an image is to get more VoCo tokens than there are vision tokens to compress.
    """
    if any(count > MAX_VOCO_TOKENS for count in counts):
        raise ValueError(f"num_voco_tokens must be at most {MAX_VOCO_TOKENS}, got {max(counts)}")


class VoCoLlamaImagesKwargs(ImagesKwargs, total=False):
    """
    num_voco_tokens (`int` or `list[int]`, *optional*):
        VoCo tokens of every image, or of each.
    """

    num_voco_tokens: int | list[int] | None


class VoCoLlamaProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: VoCoLlamaImagesKwargs  # type: ignore[misc]


class VoCoLlamaProcessor(ProcessorMixin):
    r"""
    Combines an image processor and a tokenizer. Each `<image>` of a text (or each image part of a chat message)
    becomes k `<voco>` tokens: that is all an image costs in `input_ids`. A video is its sampled frames in time order,
    each an image: `<video>` (or a video part of a chat message) stands for all of them.

    A text that starts with an image gets no BOS token: the image brings its own.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`]):
            Image processor of the vision tower.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the text model, with a `<voco>` token.
        num_voco_tokens (`int`, *optional*, defaults to 1):
            VoCo tokens of an image when a call does not say.
        chat_template (`str`, *optional*):
            Jinja template that writes `<image>` for an image part.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            What stands for an image in a text.
        voco_token (`str`, *optional*, defaults to `"<voco>"`):
            The VoCo token in the tokenizer's vocabulary.
        video_token (`str`, *optional*, defaults to `"<video>"`):
            What stands for a video in a text.
        num_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video file when a call names neither `num_frames` nor `fps`.

    Raises:
        ValueError: if the tokenizer has no `voco_token`, or `num_voco_tokens` is below 1.

    Example:

    ```python
    >>> inputs = processor(images=image, text="<image>\nWhat is this?", num_voco_tokens=2, return_tensors="pt")
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=cache, return_tensors="pt")
    >>> inputs = processor(videos="film.mp4", text="<video>\nWhat moves?", num_frames=16, return_tensors="pt")
    ```"""

    valid_processor_kwargs = VoCoLlamaProcessorKwargs  # type: ignore[assignment]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_voco_tokens: int = 1,
        chat_template: str | None = None,
        image_token: str = "<image>",
        voco_token: str = "<voco>",
        video_token: str = "<video>",
        num_frames: int = 8,
        **kwargs,
    ):
        voco_token_id = tokenizer.convert_tokens_to_ids(voco_token)
        if voco_token_id is None or voco_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {voco_token} token: add it as a special token")
        self.num_voco_tokens = per_image_counts(num_voco_tokens, 1)[0]
        self.image_token = image_token
        self.voco_token = voco_token
        self.video_token = video_token
        self.num_frames = num_frames
        self.image_token_id = voco_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        videos=None,
        voco_cache: VoCoCache | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*):
                Images in the order in which they stand in the texts.
            text (`str` or `list[str]`, *optional*):
                Texts, with `<image>` where an image stands.
            videos (`VideoInput`, *optional*):
                Videos in the order in which their `<video>` tokens stand in the texts: paths, URLs, lists of frames,
                arrays `(num_frames, height, width, 3)`. Files are decoded with the package `av`.
            voco_cache ([`VoCoCache`], *optional*):
                The images and frames compressed already, instead of `images` and `videos`.
            num_voco_tokens (`int` or `list[int]`, *optional*):
                VoCo tokens of every image, or of each; the frames of a video are images.
            num_frames, fps (`int` and `float`, *optional*):
                Frames to sample from each video, in all or per second, at most what it has. By default
                `processor.num_frames` from a file, and all frames of a list or array. With a `voco_cache`
                `num_frames` may be a list, one number a video; by default its frames are divided evenly.
            do_sample_frames (`bool`, *optional*):
                `False` takes all frames of every video.
            kwargs:
                What the image processor and the tokenizer take.

        Returns:
            [`~transformers.BatchFeature`] with `input_ids`, `attention_mask`, `pixel_values` and `num_voco_tokens`
            (one number an image or frame), which [`VoCoLlamaForConditionalGeneration.generate`] takes as they are.

        Raises:
            ValueError: if images and `<image>` tokens or videos and `<video>` tokens do not match, a video cannot be
                read, or `num_voco_tokens` does not fit.
        """
        if isinstance(text, str):
            text = [text]
        if text is not None:
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("`text` must be a string or list of strings.")
            if any(self.voco_token in sample for sample in text):
                raise ValueError(f"write {self.image_token} where an image stands: {self.voco_token} is put in for it")
        sampling = dict(kwargs.pop("videos_kwargs", {}))
        sampling |= {name: kwargs.pop(name) for name in SAMPLING if name in kwargs}
        placeholders: list[list[dict]] = []
        if voco_cache is not None and text is not None:
            text, placeholders = self._expand_cached_videos(text, voco_cache, sampling.get("num_frames"))
        if videos is not None:
            if voco_cache is not None:
                raise ValueError("pass the videos either as videos or as a voco_cache, not both")
            clips = load_videos(videos, default_num_frames=self.num_frames, **sampling)
            images, text, placeholders = self._expand_videos(images, text, clips)
        if text is not None:
            text = [self._drop_bos(sample) for sample in text]
        # Not among kwargs, which are copied deeply
        if voco_cache is not None:
            text, counts, cached = self._expand_cached_images(
                images, text, voco_cache, kwargs.pop("num_voco_tokens", None)
            )
        if text is None or not self._adds_bos(kwargs) or not any(map(self._starts_with_image, text)):
            outputs = super().__call__(images=images, text=text, **kwargs)
        else:
            outputs = self._call_without_bos(images, text, kwargs)
        if "text_replacement_offsets" in outputs:
            replaced = outputs["text_replacement_offsets"] if voco_cache is None else cached
            if placeholders:
                replaced = [self._merge_offsets(*row) for row in zip(placeholders, replaced)]
            outputs["text_replacement_offsets"] = replaced
        if voco_cache is not None:
            outputs = BatchFeature({**outputs, "num_voco_tokens": counts}, tensor_type=kwargs.get("return_tensors"))
        return outputs

    def _expand_videos(
        self, images: Any, text: list[str] | None, clips: list[list]
    ) -> tuple[list, list[str] | None, list[list[dict]]]:
        """
        Frames among the images, where their videos stand in the text, and `<image>` tokens in place of each `<video>`.
        """
        flat: list[Any] = []
        if images is not None:
            fetched: Any = make_flat_list_of_images(self.image_processor.fetch_images(images))
            flat = list(fetched)
        if text is None:
            return [*flat, *(frame for clip in clips for frame in clip)], None, []
        for token, number, name in ((self.image_token, len(flat), "images"), (self.video_token, len(clips), "videos")):
            found = sum(sample.count(token) for sample in text)
            if found != number:
                raise ValueError(f"the text has {found} {token} tokens, but {number} {name} were passed")
        replaced: Any = self.get_text_with_replacements(
            list(text), [self.image_token] * len(flat), [self.image_token * len(clip) for clip in clips]
        )
        text, placeholders = replaced
        pictures, films = iter(flat), iter(clips)
        ordered: list[Any] = []
        for placeholder in (placeholder for row in placeholders for placeholder in row):
            ordered += [next(pictures)] if placeholder["type"] == "image" else next(films)
        return ordered, text, placeholders

    def _expand_cached_videos(
        self, text: list[str], voco_cache: VoCoCache, num_frames: int | list[int] | None
    ) -> tuple[list[str], list[list[dict]]]:
        """`<image>` tokens in place of each `<video>`; what no `<image>` stands for are frames."""
        num_videos = sum(sample.count(self.video_token) for sample in text)
        if num_videos == 0:
            return text, []
        num_images = sum(sample.count(self.image_token) for sample in text)
        total = len(voco_cache) - num_images
        if num_frames is None:
            num_frames = max(total, 0) // num_videos
        frames = [num_frames] * num_videos if isinstance(num_frames, int) else list(num_frames)
        if len(frames) != num_videos or sum(frames) != total or min(frames) < 1:
            raise ValueError(
                f"{num_videos} {self.video_token} tokens of {frames} frames and {num_images} {self.image_token} "
                f"tokens do not fit a voco_cache of {len(voco_cache)} images: pass num_frames, one number a video"
            )
        images = [self.image_token] * num_images
        replaced: Any = self.get_text_with_replacements(
            list(text), images, [self.image_token * number for number in frames]
        )
        return replaced

    def _merge_offsets(self, placeholders: list[dict], replaced: list[dict]) -> list[dict]:
        """What became of each placeholder, from what became of the `<image>` tokens that it was expanded to."""
        images = iter(replaced)
        merged = []
        for placeholder in placeholders:
            parts = list(islice(images, placeholder["replacement"].count(self.image_token)))
            merged.append(
                {
                    **placeholder,
                    "new_span": (parts[0]["new_span"][0], parts[-1]["new_span"][1]),
                    "replacement": "".join(part["replacement"] for part in parts),
                }
            )
        return merged

    def iter_pixel_values(self, frames: Iterable, batch_size: int = 16, **kwargs) -> Iterator[torch.Tensor]:
        """
        Frames as [`VoCoLlamaForConditionalGeneration.compress`] takes them, a few at a time: a long video, read as it
        is decoded, is never in memory.

        Args:
            frames (`Iterable`):
                Images of any kind that the image processor takes.
            batch_size (`int`, *optional*, defaults to 16):
                Frames at a time.
            kwargs:
                What the image processor takes.

        Returns:
            `Iterator` of `torch.Tensor` of shape `(batch_size, 3, height, width)`.
        """
        frames = iter(frames)
        while batch := list(islice(frames, batch_size)):
            yield self.image_processor(batch, return_tensors="pt", **kwargs)["pixel_values"]

    def _expand_cached_images(
        self, images, text, voco_cache: VoCoCache, num_voco_tokens
    ) -> tuple[list[str], list[int], list[list[dict]]]:
        if images is not None:
            raise ValueError("pass the images either as images or as a voco_cache, not both")
        counts = voco_cache.resolve(num_voco_tokens)
        num_images = sum(sample.count(self.image_token) for sample in text or [])
        if num_images != len(voco_cache):
            raise ValueError(
                f"the text has {num_images} {self.image_token} tokens, but the voco_cache has {len(voco_cache)} images"
            )
        replaced: Any = self.get_text_with_replacements(text or [], [self.voco_token * count for count in counts])
        text, offsets = replaced
        return text, counts, offsets

    def _process_images(self, images, num_voco_tokens=None, **kwargs):
        flat_images: Any = make_flat_list_of_images(images)
        num_images = len(flat_images)
        counts = per_image_counts(self.num_voco_tokens if num_voco_tokens is None else num_voco_tokens, num_images)
        check_num_voco_tokens(counts)
        processed = self.image_processor(images, **kwargs)
        processed["num_voco_tokens"] = counts
        return processed, [self.voco_token * count for count in counts]

    def _check_special_mm_tokens(self, text: list[str], text_inputs: BatchFeature, modalities: list[str]):
        """Truncation must not cut an image apart."""
        for sample, ids in zip(text, text_inputs["input_ids"]):
            expected = len(re.findall(re.escape(self.voco_token), sample))
            found = list(ids).count(self.image_token_id)
            if found != expected:
                raise ValueError(
                    f"the text has {expected} {self.voco_token} tokens, but only {found} are left after truncation: "
                    "increase max_length or turn truncation off"
                )

    def _starts_with_image(self, sample: str) -> bool:
        return sample.startswith((self.image_token, self.voco_token))

    def _drop_bos(self, sample: str) -> str:
        """A chat template may write the BOS token itself."""
        bos = self.tokenizer.bos_token
        without = sample.removeprefix(bos) if bos is not None else sample
        return without if self._starts_with_image(without) else sample

    def _adds_bos(self, kwargs: dict) -> bool:
        text_kwargs = {**kwargs.get("text_kwargs", {}), **kwargs}
        if not text_kwargs.get("add_special_tokens", True) or self.tokenizer.bos_token_id is None:
            return False
        return self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _call_without_bos(self, images, text: list[str], kwargs: dict) -> BatchFeature:
        """Tokenizes row by row, takes the BOS off the rows that start with an image, and pads what is left."""
        text_kwargs = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)["text_kwargs"]
        image_first = [self._starts_with_image(sample) for sample in text]
        unpadded = {**kwargs, "padding": False, "return_tensors": None}
        unpadded["text_kwargs"] = {
            name: value for name, value in kwargs.get("text_kwargs", {}).items() if name not in unpadded
        }
        outputs = super().__call__(images=images, text=text, **unpadded)
        by_token = [name for name in ("input_ids", "attention_mask", "offset_mapping") if name in outputs]
        for name in by_token:
            outputs[name] = [row[1:] if first else row for row, first in zip(outputs[name], image_first)]
        padded = self.tokenizer.pad(
            {name: outputs[name] for name in by_token},
            padding=text_kwargs.get("padding", False),
            max_length=text_kwargs.get("max_length"),
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            padding_side=text_kwargs.get("padding_side"),
        )
        return BatchFeature({**outputs, **padded}, tensor_type=text_kwargs.get("return_tensors"))

    def apply_chat_template(self, *args, **kwargs):
        """See [`~transformers.ProcessorMixin.apply_chat_template`]."""
        if not kwargs.get("return_assistant_tokens_mask"):
            return super().apply_chat_template(*args, **kwargs)
        # Lists first: transformers walks over the offsets of every token, which takes long for tensors
        return_tensors = kwargs.pop("return_tensors", None)
        outputs: Any = super().apply_chat_template(*args, **kwargs)
        return outputs.convert_to_tensors(return_tensors)

    def to_dict(self) -> dict:
        # AutoProcessor looks here first, and finds the code without a model next to it
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"processing_voco_llama.{type(self).__name__}"}}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "num_voco_tokens"]


VoCoLlamaProcessor.register_for_auto_class()

__all__ = ["VoCoLlamaProcessor"]
