"""Processor of VoCo-LLaMA: images, videos and text to the short sequence."""

from .compat_voco_llama import VERSION  # noqa: F401


# isort: split
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.image_utils import ImageInput
from transformers.processing_utils import MultiModalData
from transformers.tokenization_utils_base import TextInput
from transformers.video_utils import VideoInput

from .cache_voco_llama import MAX_VOCO_TOKENS, VoCoCache
from .images_voco_llama import load_images, warn_if_scaled
from .layout_voco_llama import per_image_counts
from .options_voco_llama import ProcessorOptions, VoCoLlamaProcessorKwargs
from .placeholders_voco_llama import group_cached
from .tiled_processing_voco_llama import check_divides_images, count_processed_tiles, divides_images, process_tiles
from .video_voco_llama import load_videos


if TYPE_CHECKING:
    # A transformers that is too old to load this copies only what is named here, and says which version is needed
    from .configuration_voco_llama import VoCoLlamaConfig  # noqa: F401
    from .files_voco_llama import written_aside  # noqa: F401
    from .fingerprint_voco_llama import Fingerprint  # noqa: F401
    from .pipeline_voco_llama import register_pipeline  # noqa: F401
    from .runtime_voco_llama import awake  # noqa: F401
    from .tiles_voco_llama import TiledImages  # noqa: F401
    from .weights_voco_llama import EffectiveWeights  # noqa: F401

BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping")
# transformers marks so what a user wrote, with apply_chat_template(sanitize_control_tokens=True)
UNMARKED = "(?<!\U000f0000)"


def check_num_voco_tokens(counts: list[int]) -> None:
    """
    Raises:
        ValueError: if an image is to get more VoCo tokens than there are vision tokens to compress.
    """
    if any(count > MAX_VOCO_TOKENS for count in counts):
        raise ValueError(f"num_voco_tokens must be at most {MAX_VOCO_TOKENS}, got {max(counts)}")


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
        num_voco_tokens_per_tile (`int`, *optional*):
            For a model that was trained to compress every tile on its own: VoCo tokens of every tile when a call does
            not say, in place of `num_voco_tokens`.

    Raises:
        ValueError: if the tokenizer has no `voco_token`, a number is below 1, or `num_voco_tokens_per_tile` is given
            and the image processor divides no images.

    Example:

    ```python
    >>> inputs = processor(images=image, text="<image>\nWhat is this?", num_voco_tokens=2, return_tensors="pt")
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=cache, return_tensors="pt")
    >>> inputs = processor(videos="film.mp4", text="<video>\nWhat moves?", num_frames=16, return_tensors="pt")
    ```"""

    valid_processor_kwargs = VoCoLlamaProcessorKwargs  # type: ignore[assignment]

    # Of a processor, not of a checkpoint: trainers that hand its output on to functions of fixed arguments unset it
    return_num_voco_tokens = True

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
        num_voco_tokens_per_tile: int | None = None,
        **kwargs,
    ):
        voco_token_id = tokenizer.convert_tokens_to_ids(voco_token)
        if voco_token_id is None or voco_token_id == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer has no {voco_token} token: add it as a special token")
        self.num_voco_tokens = per_image_counts(num_voco_tokens, 1)[0]
        if num_voco_tokens_per_tile is not None:
            check_divides_images(image_processor)
            (num_voco_tokens_per_tile,) = per_image_counts(num_voco_tokens_per_tile, 1)
        self.num_voco_tokens_per_tile = num_voco_tokens_per_tile
        self.image_token = image_token
        self.voco_token = voco_token
        self.video_token = video_token
        self.num_frames = num_frames
        self.image_token_id = voco_token_id
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | list[TextInput] | None = None,
        videos: VideoInput | None = None,
        voco_cache: VoCoCache | None = None,
        **kwargs: Unpack[VoCoLlamaProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            images (`ImageInput`, *optional*):
                Images in the order in which they stand in the texts: paths, URLs, base64 strings, PIL images, arrays.
                Transparency is put on white and 16-bit greys are scaled, however an image comes; files are turned as
                their EXIF data says.
            text (`str` or `list[str]`, *optional*):
                Texts, with `<image>` where an image stands.
            videos (`VideoInput`, *optional*):
                Videos in the order in which their `<video>` tokens stand in the texts: paths, URLs, lists of frames,
                arrays `(num_frames, height, width, 3)`. Files are decoded with the package `av`.
            voco_cache ([`VoCoCache`], *optional*):
                The images and frames compressed already, instead of `images` and `videos`.
            num_voco_tokens (`int` or `list[int]`, *optional*):
                VoCo tokens of every image, or of each; the frames of a video are images. By default those of the
                processor, of every tile where it names such a number.
            num_voco_tokens_per_tile (`int`, *optional*):
                For an image processor that divides images into tiles: VoCo tokens of every tile and of the one that
                shows all of an image, each compressed on its own, instead of `num_voco_tokens` for all of them.
            num_tiles (`int` or `list[int]`, *optional*):
                With a `voco_cache` of tiles: how many of its entries each `<image>` stands for.
            return_num_voco_tokens (`bool`, *optional*):
                Whether to return `num_voco_tokens`; by default what `processor.return_num_voco_tokens` says.
            num_frames, fps (`int` and `float`, *optional*):
                Frames to sample from each video, in all or per second, at most what it has. By default
                `processor.num_frames` from a file, and all frames of a list or array. With a `voco_cache`
                `num_frames` may be a list, one number a video; by default its frames are divided evenly.
            do_sample_frames (`bool`, *optional*):
                `False` takes all frames of every video.
            kwargs:
                What the image processor and the tokenizer take, flat or as `images_kwargs` and `text_kwargs`.

        Returns:
            [`~transformers.BatchFeature`] with `input_ids`, `attention_mask`, `pixel_values`, `num_voco_tokens` (one
            number an image, frame or tile) and, where images are divided into tiles, `image_sizes`, which
            [`VoCoLlamaForConditionalGeneration.generate`] takes as they are.

        Raises:
            ValueError: if images and `<image>` tokens or videos and `<video>` tokens do not match, an image or a
                video cannot be read, or `num_voco_tokens` does not fit.
        """
        texts = self._check_text(text)
        options = ProcessorOptions.sort(kwargs, self)
        if texts is None and images is None and videos is None:
            raise ValueError("pass text, images or videos: there is nothing to process")
        placeholders = self._find_placeholders(texts)
        pixels: dict[str, Any] = {}
        if voco_cache is None:
            pictures, groups, are_frames = self._load(images, videos, placeholders, options.sampling)
            if pictures and options.numbers is None:
                options.num_voco_tokens_per_tile = self.num_voco_tokens_per_tile
            apart = options.num_voco_tokens_per_tile is not None
            pixels, numbers = self._process(pictures, are_frames, apart, **options.images)
            by_picture = iter(numbers)
            groups = [sum(islice(by_picture, size)) for size in groups]
            counts = self._counts(options.numbers, sum(numbers))
        elif images is not None or videos is not None:
            raise ValueError("pass images and videos either as they are or as a voco_cache, not both")
        else:
            counts = voco_cache.resolve(options.numbers)
            kinds = [str(match.lastgroup) for row in placeholders or [] for match in row]
            groups = group_cached(kinds, len(voco_cache), options.sampling.get("num_frames"), options.num_tiles)
        outputs: dict[str, Any] = {}
        offsets: list[list[dict]] = []
        if texts is not None and placeholders is not None:
            texts, offsets = self._expand(texts, placeholders, groups, counts)
            outputs |= self._tokenize(texts, options)
        outputs |= pixels
        if counts and self._returns_counts(options.return_num_voco_tokens, counts):
            outputs["num_voco_tokens"] = counts
        batch = BatchFeature(outputs, tensor_type=options.return_tensors)
        if options.return_text_replacement_offsets:
            batch["text_replacement_offsets"] = offsets
        return batch

    def _check_text(self, text: TextInput | list[TextInput] | None) -> list[str] | None:
        if text is None:
            return None
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(sample, str) for sample in texts):
            raise ValueError("`text` must be a string or list of strings.")
        if any(re.search(UNMARKED + re.escape(self.voco_token), sample) for sample in texts):
            raise ValueError(f"write {self.image_token} where an image stands: {self.voco_token} is put in for it")
        return list(texts)

    def _find_placeholders(self, texts: list[str] | None) -> list[list[re.Match]] | None:
        """The `<image>` and `<video>` tokens of each text."""
        if texts is None:
            return None
        image, video = re.escape(self.image_token), re.escape(self.video_token)
        pattern = re.compile(f"{UNMARKED}(?:(?P<image>{image})|(?P<video>{video}))")
        return [list(pattern.finditer(sample)) for sample in texts]

    def _load(
        self,
        images: ImageInput | None,
        videos: VideoInput | None,
        placeholders: list[list[re.Match]] | None,
        sampling: dict[str, Any],
    ) -> tuple[list[Any], list[int], list[bool]]:
        """
        Images and frames in the order of their placeholders, how many each placeholder stands for, and which are
        frames.
        """
        pictures = [] if images is None else load_images(images)
        clips = []
        if videos is not None:
            clips = [load_images(clip) for clip in load_videos(videos, default_num_frames=self.num_frames, **sampling)]
        if placeholders is None:
            frames = [frame for clip in clips for frame in clip]
            return [*pictures, *frames], [], [False] * len(pictures) + [True] * len(frames)
        kinds = [match.lastgroup for row in placeholders for match in row]
        for token, kind, number, given in (
            (self.image_token, "image", len(pictures), images),
            (self.video_token, "video", len(clips), videos),
        ):
            if (found := kinds.count(kind)) != number:
                passed = "no" if given is None else number
                raise ValueError(f"the text has {found} {token} tokens, but {passed} {kind}s were passed")
        stills, films = iter(pictures), iter(clips)
        ordered = [[next(stills)] if kind == "image" else next(films) for kind in kinds]
        are_frames = [kind == "video" for kind, group in zip(kinds, ordered) for _ in group]
        return [picture for group in ordered for picture in group], [len(group) for group in ordered], are_frames

    def _counts(self, num_voco_tokens: int | list[int] | None, num_images: int) -> list[int]:
        """VoCo tokens of each image."""
        counts = per_image_counts(self.num_voco_tokens if num_voco_tokens is None else num_voco_tokens, num_images)
        check_num_voco_tokens(counts)
        return counts

    def _returns_counts(self, asked: bool | None, counts: list[int]) -> bool:
        returned = self.return_num_voco_tokens if asked is None else asked
        if not returned and len(set(counts)) > 1:
            raise ValueError(
                f"without num_voco_tokens in the output every image needs the same number of VoCo tokens, got {counts}"
            )
        return returned

    def _expand(
        self, texts: list[str], placeholders: list[list[re.Match]], groups: list[int], counts: list[int]
    ) -> tuple[list[str], list[list[dict]]]:
        """`<voco>` tokens in place of each placeholder, and where it was and they are, as transformers says it."""
        sizes, numbers = iter(groups), iter(counts)
        expanded, offsets = [], []
        for sample, row in zip(texts, placeholders):
            last = self._bos_length(sample, row)
            parts, spans, length = [], [], 0
            for match in row:
                tokens = self.voco_token * sum(islice(numbers, next(sizes)))
                parts += [sample[last : match.start()], tokens]
                start = length + match.start() - last
                length, last = start + len(tokens), match.end()
                span = {"type": match.lastgroup, "span": match.span(), "new_span": (start, length)}
                spans.append({**span, "text": match.group(), "replacement": tokens})
            expanded.append("".join([*parts, sample[last:]]))
            offsets.append(spans)
        return expanded, offsets

    def _bos_length(self, sample: str, row: list[re.Match]) -> int:
        """Characters of a BOS token that a chat template wrote, where an image stands right behind it."""
        bos = self.tokenizer.bos_token
        return len(bos) if bos and row and row[0].start() == len(bos) and sample.startswith(bos) else 0

    def _tokenize(self, texts: list[str], options: "ProcessorOptions") -> dict[str, Any]:
        """Tokens as lists: padded behind the BOS tokens that were taken off the rows that start with an image."""
        unpadded = {**options.text, "padding": False, "return_tensors": None}
        outputs = dict(self.tokenizer(texts, **unpadded))
        if self._adds_bos(options.text):
            image_first = [sample.startswith(self.voco_token) for sample in texts]
            for name in BY_TOKEN:
                if name in outputs:
                    outputs[name] = [row[1:] if first else row for row, first in zip(outputs[name], image_first)]
        self._check_truncation(texts, outputs["input_ids"])
        if options.text.get("padding", False) is not False:
            outputs |= self._pad(outputs, options.text)
        if options.return_mm_token_type_ids:
            outputs["mm_token_type_ids"] = [
                [int(token == self.image_token_id) for token in row] for row in outputs["input_ids"]
            ]
        return outputs

    def _adds_bos(self, text_options: dict[str, Any]) -> bool:
        if not text_options.get("add_special_tokens", True) or self.tokenizer.bos_token_id is None:
            return False
        return self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]

    def _check_truncation(self, texts: list[str], input_ids: list[list[int]]) -> None:
        """Truncation must not cut an image apart."""
        for sample, ids in zip(texts, input_ids):
            expected = len(re.findall(UNMARKED + re.escape(self.voco_token), sample))
            if (found := ids.count(self.image_token_id)) != expected:
                raise ValueError(
                    f"the text has {expected} {self.voco_token} tokens, but only {found} are left after truncation: "
                    "increase max_length or turn truncation off"
                )

    def _pad(self, outputs: dict[str, Any], text_options: dict[str, Any]) -> dict[str, Any]:
        names = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
        padded = self.tokenizer.pad(
            {name: outputs[name] for name in BY_TOKEN if name in outputs and name != "offset_mapping"},
            **{name: text_options[name] for name in names if text_options.get(name) is not None},
        )
        if "offset_mapping" not in outputs:
            return dict(padded)
        side = text_options.get("padding_side") or self.tokenizer.padding_side
        offsets = []
        for row, ids in zip(outputs["offset_mapping"], padded["input_ids"]):
            blank = [(0, 0)] * (len(ids) - len(row))
            offsets.append(blank + row if side == "left" else row + blank)
        return {**padded, "offset_mapping": offsets}

    def _process(
        self, pictures: list[Any], are_frames: list[bool], apart: bool, **kwargs: Any
    ) -> tuple[dict[str, Any], list[int]]:
        """Pixels, and how many images each picture is to the model: one, or with all of its tiles `apart` several."""
        if apart:
            check_divides_images(self.image_processor)
        if not pictures:
            return {}, []
        if kwargs.get("do_rescale", getattr(self.image_processor, "do_rescale", False)):
            warn_if_scaled(pictures)
        if divides_images(self.image_processor):
            return process_tiles(self.image_processor, pictures, are_frames, apart, **kwargs)
        return dict(self.image_processor(pictures, **kwargs)), [1] * len(pictures)

    def iter_pixel_values(self, frames: Iterable, batch_size: int = 16, **kwargs: Any) -> Iterator[torch.Tensor]:
        """
        Frames as [`VoCoLlamaForConditionalGeneration.compress`] takes them, a few at a time: a long video, read as it
        is decoded, is never in memory.

        Args:
            frames (`Iterable`):
                Images of any kind that the processor takes.
            batch_size (`int`, *optional*, defaults to 16):
                Frames at a time.
            kwargs:
                What the image processor takes.

        Returns:
            `Iterator` of `torch.Tensor` of shape `(batch_size, 3, height, width)`.
        """
        frames = iter(frames)
        while batch := list(islice(frames, batch_size)):
            pixels, _ = self._process(load_images(batch), [True] * len(batch), False, return_tensors="pt", **kwargs)
            yield pixels["pixel_values"]

    # The name by which vLLM's and SGLang's backends for models of transformers ask
    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[list[int]] | None = None,
        num_voco_tokens: int | list[int] | None = None,
        num_voco_tokens_per_tile: int | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        """
        What images cost in `input_ids`, whatever their size unless each tile has tokens of its own.

        Args:
            image_sizes (`list[list[int]]`, *optional*):
                Height and width of each image.
            num_voco_tokens (`int` or `list[int]`, *optional*):
                VoCo tokens of every image, or of each.
            num_voco_tokens_per_tile (`int`, *optional*):
                VoCo tokens of every tile, instead.
        """
        if image_sizes is None:
            return MultiModalData()
        if num_voco_tokens is None and num_voco_tokens_per_tile is None:
            num_voco_tokens_per_tile = self.num_voco_tokens_per_tile
        if num_voco_tokens_per_tile is None:
            counts, tiles = self._counts(num_voco_tokens, len(image_sizes)), [1] * len(image_sizes)
        else:
            tiles = count_processed_tiles(self.image_processor, image_sizes)
            counts = [num_voco_tokens_per_tile * number for number in tiles]
        return MultiModalData(num_image_tokens=counts, num_image_patches=tiles)

    def apply_chat_template(self, *args, **kwargs):
        """
        See [`~transformers.ProcessorMixin.apply_chat_template`].

        Raises:
            ValueError: if the template cannot be read, or fails on the conversation.
        """
        # Lists first: transformers walks over the offsets of every token, which takes long for tensors
        in_lists = kwargs.get("return_assistant_tokens_mask") and kwargs.get("return_dict")
        return_tensors = kwargs.pop("return_tensors", None) if in_lists else None
        try:
            outputs: Any = super().apply_chat_template(*args, **kwargs)
        except Exception as error:
            if not _is_of_template(error):
                raise
            raise ValueError(
                f"the chat template fails on this conversation: {error or type(error).__name__}"
            ) from error
        return outputs.convert_to_tensors(return_tensors) if in_lists else outputs

    def to_dict(self) -> dict:
        # AutoProcessor looks here first, and finds the code without a model next to it
        return {**super().to_dict(), "auto_map": {"AutoProcessor": f"processing_voco_llama.{type(self).__name__}"}}

    @property
    def model_input_names(self) -> list[str]:
        # That of LLaVA-OneVision also says which images are divided, which all are here
        names = [name for name in super().model_input_names if name != "batch_num_images"]
        return [*names, "num_voco_tokens"] if self.return_num_voco_tokens else names


def _is_of_template(error: Exception) -> bool:
    """Whether Jinja raised an error, or the code that it makes of a template (whose frames are called so)."""
    frame, inside = error.__traceback__, False
    while frame is not None and not inside:
        inside = frame.tb_frame.f_code.co_filename == "<template>"
        frame = frame.tb_next
    return inside or type(error).__module__.partition(".")[0] == "jinja2"


VoCoLlamaProcessor.register_for_auto_class()

__all__ = ["VoCoLlamaProcessor"]
