"""`VoCoCompressor`: batches of images to batches of compressed images, for Ray Data, Daft or `datasets`."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..images import decode_image, open_image
from ..loading import default_device, load_model, load_processor
from ..modeling import VoCoCache
from ..modeling.cache_voco_llama import digest
from ..modeling.images_voco_llama import to_rgb
from ..modeling.layout_voco_llama import per_image_counts
from ..modeling.processing_voco_llama import check_num_voco_tokens
from ..modeling.tiled_processing_voco_llama import check_divides_images
from ..pictures import choose_number, prepare
from .compression import Compression, Sampling
from .content import Content, hash_pixels
from .rows import Packed, arrow_schema, to_row, to_table
from .shards import Record, pack


if TYPE_CHECKING:
    import pyarrow

NOT_RAW = "give the bytes of a file, a PIL image or an array of shape (height, width, 3)"


@dataclass(frozen=True)
class Item:
    """
    What is to be compressed.

    Args:
        source (`str`):
            Where it comes from, by whose ending a video is known; may be empty.
        read (`Callable`):
            Returns its file as a `Path` or as bytes, or an image. What it raises is wrong with this item alone.
        mtime_ns (`int`, *optional*, defaults to 0):
            What changes when the source does.
    """

    source: str
    read: Callable[[], Any]
    mtime_ns: int = 0


@dataclass(frozen=True)
class Outcome:
    """
    What became of an item.

    Args:
        source (`str`): Where it comes from.
        content ([`Content`], *optional*): What it is; `None` if it cannot be read.
        cache ([`VoCoCache`], *optional*): Its images, compressed; `None` if that was done before.
        error (`str`, *optional*): Why it cannot be read.
    """

    source: str
    content: Content | None = None
    cache: VoCoCache | None = None
    error: str | None = None


class VoCoCompressor:
    """
    Holds a model and compresses batches of images and videos: a class for `map_batches` of Ray Data, a function for
    `datasets.map(batched=True)`, a part of a UDF of Daft.

    Args:
        model (`str`):
            Folder or Hub id, of a whole model or of adapters.
        num_voco_tokens (`int`, *optional*):
            VoCo tokens of an image or frame; the model's own number by default.
        num_frames (`int`, *optional*):
            Frames of a video; the model's own number by default.
        fps (`float`, *optional*):
            Frames of a video a second, instead of `num_frames`.
        batch_size (`int`, *optional*, defaults to 16):
            Images or frames that are compressed at a time.
        num_threads (`int`, *optional*, defaults to 2):
            Threads that read and decode ahead.
        eight_bit (`bool`, *optional*, defaults to `False`):
            Whether rows hold keys and values in 8 bits.
        image_column (`str`, *optional*, defaults to `"image"`):
            Column of a batch that holds the images: bytes of image and video files, `{"bytes": ..., "path": ...}` as
            in data sets, PIL images, or arrays of shape `(height, width, 3)` of uint8.
        source_column (`str`, *optional*, defaults to `"path"`):
            Column that says where they come from, if there is one; videos are known by its ending.
        device (`str`, *optional*):
            By default the accelerator if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type to run in, by default that of the checkpoint.
        num_voco_tokens_per_tile (`int`, *optional*):
            VoCo tokens of every tile of an image, and of every frame, instead of `num_voco_tokens`.

    Raises:
        ValueError: if there is no such model, it cannot have so many VoCo tokens, or it divides no images into tiles.

    Example:

    ```python
    >>> photos = ray.data.read_binary_files("s3://bucket/photos", include_paths=True)
    >>> rows = photos.map_batches(
    ...     VoCoCompressor,
    ...     fn_constructor_kwargs={"model": "user/voco-llama-7b", "num_voco_tokens": 2, "image_column": "bytes"},
    ...     batch_size=64, num_gpus=1, concurrency=8,
    ... )
    >>> rows.write_parquet("s3://bucket/compressed")  # for `voco-llama store import`
    ```"""

    def __init__(
        self,
        model: str,
        num_voco_tokens: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        batch_size: int = 16,
        num_threads: int = 2,
        eight_bit: bool = False,
        image_column: str = "image",
        source_column: str = "path",
        device: str | None = None,
        dtype: str = "auto",
        num_voco_tokens_per_tile: int | None = None,
    ):
        self._arguments = {name: value for name, value in locals().items() if name != "self"}
        if num_frames is not None and fps is not None:
            raise ValueError("give num_frames or fps, not both")
        if num_voco_tokens is not None and num_voco_tokens_per_tile is not None:
            raise ValueError("give num_voco_tokens or num_voco_tokens_per_tile, not both")
        self.processor = load_processor(model)
        given, per_tile = choose_number(self.processor, num_voco_tokens, num_voco_tokens_per_tile)
        if per_tile:
            check_divides_images(self.processor.image_processor)
        (self.num_voco_tokens,) = per_image_counts(given, 1)
        check_num_voco_tokens([self.num_voco_tokens])
        self.sampling = Sampling(num_frames or (self.processor.num_frames if fps is None else None), fps, per_tile)
        self.batch_size, self.num_threads, self.eight_bit = batch_size, num_threads, eight_bit
        self.image_column, self.source_column = image_column, source_column
        network: Any = load_model(model, dtype=dtype)
        self.model = network.to(default_device() if device is None else torch.device(device)).eval()
        self._compression = Compression(self.model, self.processor, self.num_voco_tokens, self.sampling, batch_size)
        self.fingerprint = self._compression.fingerprint()

    def __reduce__(self) -> tuple:
        """Travels as its arguments, not as its weights."""
        return _build, (self._arguments,)

    def __call__(self, batch: "Mapping[str, Any] | pyarrow.Table") -> "pyarrow.Table":
        """
        Compresses a batch.

        Args:
            batch (`Mapping` or `pyarrow.Table`): Columns, each a sequence.

        Returns:
            `pyarrow.Table`: a row a row, with the columns of [`arrow_schema`], `error`, which says what is wrong with
            an image that cannot be read and is null otherwise, and those of the batch but its images.

        Raises:
            KeyError: if there is no column of images.
            ImportError: if `pyarrow` is not installed.
        """
        import pyarrow as pa

        columns = batch.to_pydict() if isinstance(batch, pa.Table) else dict(batch)
        if self.image_column not in columns:
            raise KeyError(f"no column {self.image_column!r}: there are {', '.join(columns)}")
        values = list(columns.pop(self.image_column))
        sources = [_text(source) for source in columns.get(self.source_column, [""] * len(values))]
        items = [Item(source or _path(value), _reader(value)) for source, value in zip(sources, values)]
        schema = arrow_schema().append(pa.field("error", pa.string()))
        table = to_table([self._row(outcome) for outcome in self.compress(items, in_order=True)], schema)
        for name in columns.keys() - set(schema.names):
            table = table.append_column(name, pa.array(list(columns[name])))
        return table

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        content, cache = outcome.content, outcome.cache
        sources = [outcome.source] if outcome.source else []
        if content is None or cache is None:
            return {"sources": sources, "error": outcome.error}
        tensors = pack(cache, self.eight_bit)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = Record(content, self.num_voco_tokens, len(cache), 0, digest(*tensors.values()), now)
        return to_row(Packed(record, tensors, cache.dtype, self.fingerprint, tuple(sources)))

    def compress(
        self, items: Iterable[Item], known: Collection[tuple[str, str]] | None = None, in_order: bool = False
    ) -> Iterator[Outcome]:
        """
        Compresses whatever there is, read and decoded ahead.

        Args:
            items (`Iterable[Item]`):
                Images and videos.
            known (`Collection`, *optional*):
                Hashes and samplings of contents that need not be compressed. Contents that come again are not either.
                `None` compresses all.
            in_order (`bool`, *optional*, defaults to `False`):
                Whether outcomes come in the order of the items.

        Yields:
            [`Outcome`]: one an item.
        """
        seen: set[tuple[str, str]] = set()
        waiting: list[tuple[Content, dict[str, torch.Tensor]]] = []
        for outcome, pixels in self._read_ahead(items):
            content = outcome.content
            if content is not None and known is not None:
                key = content.content_hash, content.sampling
                if key in known or key in seen:
                    outcome, pixels, content = Outcome(outcome.source, content), None, None
                else:
                    seen.add(key)
            if content is not None and isinstance(pixels, dict):
                waiting.append((content, pixels))
                if len(waiting) == self.batch_size:
                    yield from self._compress_images(waiting)
                    waiting = []
                continue
            if in_order:
                yield from self._compress_images(waiting)
                waiting = []
            yield outcome if content is None else self._compress_video(content, pixels)
        yield from self._compress_images(waiting)

    def _read_ahead(self, items: Iterable[Item]) -> Iterator[tuple[Outcome, Any]]:
        """Content of each item and, of an image, its pixels; of a video its bytes."""
        ahead: deque[Future] = deque()
        with ThreadPoolExecutor(self.num_threads) as threads:
            try:
                for item in items:
                    ahead.append(threads.submit(self._read, item))
                    if len(ahead) > self.batch_size + self.num_threads:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _read(self, item: Item) -> tuple[Outcome, Any]:
        try:
            value = item.read()
            content = self._describe(item, value)
            if content.is_video:
                return Outcome(item.source, content), value
            return Outcome(item.source, content), prepare(
                self.processor.image_processor, _to_image(value, item.source)
            )
        except Exception as error:  # whatever is wrong with an item is wrong with this one alone
            return Outcome(item.source, error=str(error) or type(error).__name__), None

    def _describe(self, item: Item, value: Any) -> Content:
        source, sampling = item.source, self.sampling.of(item.source)
        if isinstance(value, Path):
            return replace(Content.of_file(value, sampling), source=source)
        if isinstance(value, bytes):
            return Content(hashlib.sha256(value).hexdigest(), sampling, source, len(value), item.mtime_ns)
        return Content(hash_pixels(value), self.sampling.of(""), source, np.asarray(value).nbytes, item.mtime_ns)

    def _compress_images(self, waiting: list[tuple[Content, dict[str, torch.Tensor]]]) -> Iterator[Outcome]:
        if not waiting:
            return
        contents, pixels = zip(*waiting)
        for content, cache in zip(contents, self._compression.compress_images(pixels)):
            yield Outcome(content.source, content, cache)

    def _compress_video(self, content: Content, file: Path | bytes) -> Outcome:
        try:
            with _as_file(file, content.source) as path:
                cache = self._compression.compress_video(str(path))
        except (OSError, ValueError) as error:
            return Outcome(content.source, error=str(error))
        return Outcome(content.source, content, cache)


@contextmanager
def _as_file(file: Path | bytes, source: str) -> Iterator[Path]:
    """FFmpeg reads files; what is wrong with this one is wrong with its source."""
    if isinstance(file, Path):
        yield file
        return
    with TemporaryDirectory() as folder:
        path = Path(folder, f"video{Path(source).suffix}")
        path.write_bytes(file)
        try:
            yield path
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), source)) from error


def _build(arguments: dict[str, Any]) -> VoCoCompressor:
    return VoCoCompressor(**arguments)


def _text(source: object) -> str:
    return os.fsdecode(source) if isinstance(source, bytes) else "" if source is None else str(source)


def _path(value: object) -> str:
    """The name that an image of a data set carries. It is never opened: whoever made the data set chose it."""
    return _text(value.get("path")) if isinstance(value, Mapping) else ""


def _reader(value: Any) -> Callable[[], Any]:
    def read() -> Any:
        found = value.get("bytes") if isinstance(value, Mapping) else value
        if found is None:
            raise ValueError("there are no bytes of an image")
        return bytes(found) if isinstance(found, (bytearray, memoryview)) else found

    return read


def _to_image(value: Any, source: str) -> Image.Image:
    if isinstance(value, Path):
        return open_image(value)
    if isinstance(value, bytes):
        return decode_image(value, source or "the image")
    if isinstance(value, Image.Image):
        return to_rgb(ImageOps.exif_transpose(value))
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim not in (2, 3):
        raise ValueError(f"{type(value).__name__} is no image: {NOT_RAW}")
    return to_rgb(Image.fromarray(value))


__all__ = ["Item", "Outcome", "VoCoCompressor"]
