"""Compressing, asking and comparing, one call at a time; nothing here knows of Gradio."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, StoppingCriteria, TextIteratorStreamer

from ..hub.cost import CostModel
from ..llava import as_llava
from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..modeling.configuration_voco_llama import cache_bytes
from ..modeling.fingerprint_voco_llama import with_images
from ..modeling.tiled_processing_voco_llama import divides_images
from ..pictures import PIXELS, name_number
from ..prompts import build_prompt, check_question, starts_with_bos
from ..serving import ImageCache, Limits
from ..vision_tokens import count_vision_tokens
from .sources import Source, load_cache, open_cache, open_picture, preprocess, read_pictures
from .stopwatch import Spent, Stopwatch


UNCOMPRESSED = 0  # in place of a number of VoCo tokens
MAX_QUESTION = 500  # characters
LIMITS = Limits(max_pixels=25_000_000, max_tokens=256, max_queue=32)


@dataclass(frozen=True)
class Reading:
    """
    What is kept of the images, to be read by questions.

    Args:
        num_tokens (`int`): Tokens, of all images together.
        nbytes (`int`): Bytes of their keys and values.
        spent (`Spent`): What it took to make; nothing if it was there already.
    """

    num_tokens: int
    nbytes: int
    spent: Spent


@dataclass(frozen=True)
class Answer:
    """
    Args:
        text (`str`): As far as it has come.
        spent (`Spent`): What it took; nothing is known before it is done.
        num_prompt_tokens (`int`): Tokens that the language model read, those of the images with them.
        flops (`int`): Operations until its first token, counted, see [`CostModel`].
        is_done (`bool`): Whether this is all of it.
    """

    text: str
    spent: Spent
    num_prompt_tokens: int
    flops: int
    is_done: bool = False


class Abandoned(StoppingCriteria):
    """Ends an answer that nobody waits for any more."""

    def __init__(self) -> None:
        self.event = Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        flags = torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)
        return flags  # type: ignore[return-value]


class DemoEngine:
    """
    A model with a memory of what it has compressed. All that it computes runs on one thread, in turn.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Model that answers.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        limits ([`Limits`], *optional*, defaults to [`LIMITS`]):
            Bounds: bytes of a file, pixels of an image, frames of a video (`max_images`), tokens of an answer.
        image_cache_bytes (`int`, *optional*, defaults to 256,000,000): Bytes of compressed images to remember.
    """

    def __init__(
        self,
        model: VoCoLlamaForConditionalGeneration,
        processor: VoCoLlamaProcessor,
        limits: Limits = LIMITS,
        image_cache_bytes: int = 256_000_000,
    ):
        self.model = model
        self.processor = processor
        self.limits = limits
        self.divides_images = divides_images(processor.image_processor)
        self.per_tile = processor.num_voco_tokens_per_tile is not None
        self.num_frames = min(processor.num_frames, self.limits.max_images)
        self.cost = CostModel(model.config)
        self.num_vision_tokens = self.cost.num_vision_tokens
        self.window: int = model.config.text_config.max_position_embeddings
        self._images = ImageCache(image_cache_bytes)
        self._llava: Any = as_llava(model)
        self._stopwatch = Stopwatch(model)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")

    def warm_up(self) -> None:
        """A first call, which takes longer than all others, before anyone looks at the clock."""
        prompt = build_prompt(self.processor, ["image"], "?")
        inputs = self._all_inputs(prompt, [Image.new("RGB", (64, 64))], "image")
        self._worker.submit(self._read_all, inputs, max_new_tokens=1).result()
        pixels = {name: inputs[name] for name in PIXELS if name in inputs}
        cache = self._worker.submit(self.model.compress, **pixels, num_voco_tokens=1).result()
        self._worker.submit(self._generate, self._inputs(prompt, cache, "image"), max_new_tokens=1).result()

    # What a visitor does

    def open(self, path: str, owner: str, num_voco_tokens: int, per_tile: bool = False) -> tuple[Source, Reading]:
        """
        Reads and compresses an image or a video.

        Args:
            path (`str`): File, named like a video or else an image.
            owner (`str`): Who brings it; the memory of compressed images is not shared between owners.
            num_voco_tokens (`int`): VoCo tokens an image.
            per_tile (`bool`, *optional*, defaults to `False`): Whether they are those of each of its tiles.

        Raises:
            ValueError: if it cannot be read within the limits.
        """
        source, pictures = open_picture(path, owner, self.limits, self.num_frames)
        return source, self._compress(source, num_voco_tokens, per_tile, pictures)

    def open_cache(self, path: str, owner: str) -> tuple[Source, Reading]:
        """
        Reads a file of [`DemoEngine.save`].

        Raises:
            ValueError: if it is none, or was made by another model.
        """
        source = open_cache(path, owner, self.model, self.processor, self.limits)
        if source.num_voco_tokens >= self.window:
            raise ValueError(
                f"{source.name} has {source.num_voco_tokens:,} VoCo tokens, more than the model's window of "
                f"{self.window:,} takes"
            )
        return source, self.compress(source, 0)

    def compress(self, source: Source, num_voco_tokens: int, per_tile: bool = False) -> Reading:
        """The VoCo tokens of what was opened before: made now, unless they are there."""
        return self._compress(source, num_voco_tokens, per_tile)

    def ask(self, source: Source, num_voco_tokens: int, question: str, per_tile: bool = False) -> Iterator[Answer]:
        """
        Answers from the VoCo tokens, as the words come. Without an error the last answer is done.

        Raises:
            ValueError: if the question is empty, too long, or holds tokens of images.
        """
        prompt = self._prompt(source, question)
        cache, made_now = self._cache(source, num_voco_tokens, per_tile)
        inputs = self._inputs(prompt, cache, kind_of(source))
        length = inputs["input_ids"].shape[1]
        num_kept = sum(cache.token_counts)
        flops = self.cost.text_flops(length - num_kept, num_kept) + 2 * self.cost.head_weights
        max_new_tokens = self._bound(length)

        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        abandoned, text = Abandoned(), ""
        future = self._worker.submit(
            self._generate, inputs, max_new_tokens, streamer=streamer, stopping_criteria=[abandoned]
        )
        try:
            for piece in streamer:
                text += piece
                if text.strip():
                    yield Answer(text.strip(), Spent(), length, flops)
            _, spent = future.result()
        finally:
            abandoned.event.set()
        spent = Spent(spent.vision_ms + made_now.vision_ms, spent.language_ms + made_now.language_ms)
        yield Answer(text.strip(), spent, length, flops, is_done=True)

    def ask_uncompressed(self, source: Source, question: str) -> tuple[Reading, Answer]:
        """
        Answers as a LLaVA of the same weights does: from all vision tokens, made and read for every question.

        Raises:
            ValueError: if the source holds no picture, or its tokens do not fit into the model's window.
        """
        prompt = self._prompt(source, question)
        pictures = self._pictures(source)
        inputs = self._all_inputs(prompt, pictures, kind_of(source))
        length = inputs["input_ids"].shape[1]
        num_tokens = int((inputs["input_ids"] == self.model.config.voco_token_id).sum())
        ids, spent = self._worker.submit(self._read_all, inputs, self._bound(length)).result()
        text = self.processor.decode(ids[0, length:], skip_special_tokens=True).strip()
        flops = (
            source.num_images * self.cost.vision_flops() + self.cost.text_flops(length) + 2 * self.cost.head_weights
        )
        reading = Reading(num_tokens, self.nbytes(num_tokens), Spent())
        return reading, Answer(text, spent, length, flops, is_done=True)

    def compare(
        self, source: Source, question: str, counts: Sequence[int], per_tile: bool = False
    ) -> Iterator[tuple[int, Reading, Answer]]:
        """The same question at several numbers of VoCo tokens; [`UNCOMPRESSED`] is one of them."""
        for count in counts:
            if count == UNCOMPRESSED:
                yield count, *self.ask_uncompressed(source, question)
            else:
                reading = self.compress(source, count, per_tile)
                yield count, reading, list(self.ask(source, count, question, per_tile))[-1]

    def save(self, source: Source, num_voco_tokens: int, folder: str, per_tile: bool = False) -> Path:
        """Writes the VoCo tokens into a new folder inside `folder`."""
        cache, _ = self._cache(source, num_voco_tokens, per_tile)
        made = f"k{num_voco_tokens}-tiles" if per_tile else f"k{num_voco_tokens}"
        stem = source.name if source.kind == "cache" else f"{Path(source.name).stem}-{made}.safetensors"
        path = Path(tempfile.mkdtemp(dir=folder)) / stem
        if source.kind != "cache":
            cache = cache[:]  # what is in memory stays as it is
            cache.fingerprint = with_images(cache.fingerprint, self.processor.image_processor)
        cache.save(path)
        return path

    def nbytes(self, num_tokens: int) -> int:
        """Bytes of the keys and values of tokens of the running model."""
        return cache_bytes(self.model.config, num_tokens, self.model.dtype)

    # How it is done

    def _compress(
        self, source: Source, num_voco_tokens: int, per_tile: bool, pictures: list[Any] | None = None
    ) -> Reading:
        cache, spent = self._cache(source, num_voco_tokens, per_tile, pictures)
        return Reading(sum(cache.token_counts), cache.nbytes, spent)

    def _cache(
        self, source: Source, num_voco_tokens: int, per_tile: bool, pictures: list[Any] | None = None
    ) -> tuple[VoCoCache, Spent]:
        """From memory, or made now: of a file, or of the pictures."""
        per_tile = per_tile and source.kind == "image"  # frames are not divided
        if (known := self._images.get(source.key, num_voco_tokens, per_tile)) is not None:
            return known, Spent()
        if source.kind == "cache":
            cache = load_cache(source.path, self.model, self.processor, self.limits)
            make = lambda: cache  # noqa: E731
        else:
            # Read and made small outside of the thread that computes
            shown = self._pictures(source) if pictures is None else pictures
            pixels: dict[str, Any] = preprocess(self.processor, shown, kind_of(source), self.model.dtype)
            numbers = name_number(num_voco_tokens, per_tile)
            make = lambda: self.model.compress(  # noqa: E731
                **pixels, **numbers, show_progress=False, exact=False
            )
        return self._worker.submit(self._remember, source.key, num_voco_tokens, make, per_tile).result()

    def _remember(
        self, key: str, num_voco_tokens: int, make: Callable[[], VoCoCache], per_tile: bool
    ) -> tuple[VoCoCache, Spent]:
        with self._stopwatch.measure() as spent:
            cache, is_known = self._images.get_or_compress(key, num_voco_tokens, make, per_tile)
        return cache, Spent() if is_known else spent

    def _pictures(self, source: Source) -> list[Any]:
        if source.kind == "cache":
            raise ValueError(
                f"{source.name} holds no picture, only what VoCo tokens have kept of one: drop the picture itself"
            )
        return read_pictures(source.path, self.limits, self.num_frames)

    def _prompt(self, source: Source, question: str) -> str:
        if len(question) > MAX_QUESTION:
            raise ValueError(
                f"the question is too long: {len(question):,} characters, at most {MAX_QUESTION} are read"
            )
        check_question(question, self.processor)
        return build_prompt(self.processor, [kind_of(source)], question.strip())

    def _bound(self, num_prompt_tokens: int) -> int:
        """Tokens that an answer may have behind a prompt."""
        if num_prompt_tokens >= self.window:
            raise ValueError(
                f"it does not fit: the prompt has {num_prompt_tokens:,} tokens, the model's window {self.window:,}"
            )
        return min(self.limits.max_tokens, self.window - num_prompt_tokens)

    def _tokenize(self, prompt: str, **images: Any) -> BatchFeature:
        add_special_tokens = not starts_with_bos(prompt, self.processor)
        return self.processor(text=prompt, add_special_tokens=add_special_tokens, return_tensors="pt", **images)

    def _inputs(self, prompt: str, cache: VoCoCache, kind: str) -> dict[str, Any]:
        """What `generate` takes for a compressed image, of all or each of its tiles, or the frames of a video."""
        tiles = len(cache) if kind == "image" else None
        inputs = self._tokenize(prompt, voco_cache=cache, num_tiles=tiles).to(self.model.device)
        return {**inputs, "voco_cache": cache.to(self.model.device)}

    def _generate(self, inputs: dict[str, Any], max_new_tokens: int, **options: Any) -> tuple[torch.Tensor, Spent]:
        try:
            with self._stopwatch.measure() as spent:
                ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, **options)
        finally:
            if "streamer" in options:
                options["streamer"].end()  # whoever reads it must not wait for ever
        return ids, spent

    def _read_all(self, inputs: dict[str, Any], max_new_tokens: int) -> tuple[torch.Tensor, Spent]:
        with self._stopwatch.measure() as spent:
            ids = self._llava.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return ids, spent

    def _all_inputs(self, prompt: str, pictures: list[Any], kind: str) -> dict[str, Any]:
        """What `generate` of the LLaVA takes: a `<voco>` token for every vision token, which have that id there."""
        images = {"images": pictures} if kind == "image" else {"videos": [pictures]}
        inputs = self._tokenize(prompt, num_voco_tokens=1, **images).to(self.model.device)
        ids = inputs["input_ids"]
        is_image = ids[0] == self.model.config.voco_token_id
        repeats = torch.ones_like(ids[0])
        repeats[is_image] = torch.tensor(self._count_vision_tokens(inputs, kind), device=ids.device)
        ids = ids.repeat_interleave(repeats, dim=1)
        if is_image[0]:
            # The BOS token that an image brings with it
            prefix = torch.tensor([self.model.config.vision_prefix_token_ids], dtype=ids.dtype, device=ids.device)
            ids = torch.cat([prefix, ids], dim=1)
        pixels = {name: inputs[name] for name in PIXELS if name in inputs}
        pixels["pixel_values"] = pixels["pixel_values"].to(self.model.dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}

    def _count_vision_tokens(self, inputs: BatchFeature, kind: str) -> list[int]:
        """
        Of each image.

        Raises:
            ValueError: for the frames of a video, where the base model reads them in another way than images.
        """
        config = self.model.config
        if config.base_model_type == "llava":
            return [self.num_vision_tokens] * len(inputs["pixel_values"])
        if kind == "video":
            raise ValueError(f"{config.base_model_type} reads no video uncompressed here: ask about an image")
        return [count_vision_tokens(config, (height, width)) for height, width in inputs["image_sizes"].tolist()]


def kind_of(source: Source) -> str:
    """How a prompt calls it. A file of several compressed images is taken for the frames of a video."""
    return "image" if source.num_images == 1 and source.kind != "video" else "video"


__all__ = ["MAX_QUESTION", "UNCOMPRESSED", "Answer", "DemoEngine", "Reading"]
