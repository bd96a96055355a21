"""Processor of VoCo-LLaMA: images and text to the short sequence."""

import re
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, ProcessingKwargs

from .attention_voco_llama import per_image_counts
from .cache_voco_llama import VoCoCache


MAX_VOCO_TOKENS = 576


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
    becomes k `<voco>` tokens: that is all an image costs in `input_ids`.

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

    Raises:
        ValueError: if the tokenizer has no `voco_token`, or `num_voco_tokens` is below 1.

    Example:

    ```python
    >>> inputs = processor(images=image, text="<image>\nWhat is this?", num_voco_tokens=2, return_tensors="pt")
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=cache, return_tensors="pt")
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
        **kwargs,
    ):
        voco_token_id = tokenizer.convert_tokens_to_ids(voco_token)
        if voco_token_id is None or voco_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {voco_token} token: add it as a special token")
        self.num_voco_tokens = per_image_counts(num_voco_tokens, 1)[0]
        self.image_token = image_token
        self.voco_token = voco_token
        self.image_token_id = voco_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images=None,
        text: str | list[str] | None = None,
        voco_cache: VoCoCache | None = None,
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*):
                Images in the order in which they stand in the texts.
            text (`str` or `list[str]`, *optional*):
                Texts, with `<image>` where an image stands.
            voco_cache ([`VoCoCache`], *optional*):
                The images compressed already, instead of `images`.
            num_voco_tokens (`int` or `list[int]`, *optional*):
                VoCo tokens of every image, or of each.
            kwargs:
                What the image processor and the tokenizer take.

        Returns:
            [`~transformers.BatchFeature`] with `input_ids`, `attention_mask`, `pixel_values` and `num_voco_tokens`
            (one number an image), which [`VoCoLlamaForConditionalGeneration.generate`] takes as they are.

        Raises:
            ValueError: if images and `<image>` tokens do not match, or `num_voco_tokens` does not fit.
        """
        if isinstance(text, str):
            text = [text]
        if text is not None:
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("`text` must be a string or list of strings.")
            if any(self.voco_token in sample for sample in text):
                raise ValueError(f"write {self.image_token} where an image stands: {self.voco_token} is put in for it")
            text = [self._drop_bos(sample) for sample in text]
        # Not among kwargs, which are copied deeply
        if voco_cache is not None:
            text, counts = self._expand_cached_images(images, text, voco_cache, kwargs.pop("num_voco_tokens", None))
        if text is None or not self._adds_bos(kwargs) or not any(map(self._starts_with_image, text)):
            outputs = super().__call__(images=images, text=text, **kwargs)
        else:
            outputs = self._call_without_bos(images, text, kwargs)
        if voco_cache is not None:
            outputs = BatchFeature({**outputs, "num_voco_tokens": counts}, tensor_type=kwargs.get("return_tensors"))
        return outputs

    def _expand_cached_images(
        self, images, text, voco_cache: VoCoCache, num_voco_tokens
    ) -> tuple[list[str], list[int]]:
        if images is not None:
            raise ValueError("pass the images either as images or as a voco_cache, not both")
        counts = voco_cache.resolve(num_voco_tokens)
        num_images = sum(sample.count(self.image_token) for sample in text or [])
        if num_images != len(voco_cache):
            raise ValueError(
                f"the text has {num_images} {self.image_token} tokens, but the voco_cache has {len(voco_cache)} images"
            )
        return self.get_text_with_replacements(text or [], [self.voco_token * count for count in counts])[0], counts

    def _process_images(self, images, num_voco_tokens=None, **kwargs):
        flat_images: Any = make_flat_list_of_images(images)
        num_images = len(flat_images)
        counts = per_image_counts(self.num_voco_tokens if num_voco_tokens is None else num_voco_tokens, num_images)
        if any(count > MAX_VOCO_TOKENS for count in counts):
            raise ValueError(f"num_voco_tokens must be at most {MAX_VOCO_TOKENS}, got {max(counts)}")
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
