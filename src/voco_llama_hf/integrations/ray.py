"""Ray Data: an archive into a store, on all the machines of a cluster, some of which may die."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from ..modeling import VoCoCache
from ..modeling.configuration_voco_llama import cache_bytes
from ..store import Content, VoCoStore
from ..store.archives import Archive, File, read_source, read_table
from ..store.compression import Sampling
from ..store.compressor import Item, Outcome, VoCoCompressor
from ..store.indexing import Indexed
from ..store.shards import write_shard
from ..vision_tokens import count_vision_tokens


if TYPE_CHECKING:
    from ray.data import Dataset

RETRIES = 3  # of a batch whose worker was lost: what kills every worker is no bad luck
# Names of files are bytes, and not always text
INPUT = pa.schema(
    [("source", pa.binary()), ("version", pa.int64()), ("data", pa.large_binary()), ("error", pa.string())]
)
OUTPUT = pa.schema(
    [
        ("source", pa.binary()),
        ("content_hash", pa.string()),
        ("sampling", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("num_images", pa.int64()),
        ("num_tokens", pa.int64()),
        ("error", pa.string()),
    ]
)


class ShardWriter:
    """
    What each worker holds: a model that compresses batches and writes them to shards of the store. What it returns is
    small.

    Args:
        store (`str`): Folder of the store, which all workers reach.
        options (`dict`): Arguments of [`VoCoCompressor`].
        known (`list`): Reference to the contents that are stored already, in a list for Ray not to look it up.
        shard_images (`int`): Images or frames of a shard.
    """

    def __init__(self, store: str, options: dict[str, Any], known: list[ray.ObjectRef], shard_images: int):
        self.shards = Path(store) / "shards"
        self.compressor = VoCoCompressor(**options)
        self.known: set[tuple[str, str]] = ray.get(known[0])
        self.shard_images = shard_images

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        entries: list[tuple[Content, VoCoCache]] = []
        for outcome in self.compressor.compress(map(_item, batch.to_pylist()), self.known):
            rows.append(_row(outcome))
            if outcome.content is not None and outcome.cache is not None:
                entries.append((outcome.content, outcome.cache))
            if sum(len(cache) for _, cache in entries) >= self.shard_images:
                self._write(entries)
                entries = []
        self._write(entries)
        return pa.Table.from_pylist(rows, schema=OUTPUT)

    def _write(self, entries: list[tuple[Content, VoCoCache]]) -> None:
        # A worker that dies after this is asked for again: the index takes each content once
        if entries:
            contents, caches = zip(*entries)
            write_shard(self.shards, contents, caches, self.compressor.eight_bit)


@dataclass(frozen=True)
class Described:
    """What the head node, which may have no room for a model, has to know of it."""

    fingerprint: dict[str, str]
    num_voco_tokens: int
    sampling: Sampling
    vision_tokens: int
    token_bytes: int


def describe(options: dict[str, Any]) -> Described:
    compressor = VoCoCompressor(**options)
    config = compressor.model.config
    return Described(
        dict(compressor.fingerprint),
        compressor.num_voco_tokens,
        compressor.sampling,
        count_vision_tokens(config),
        cache_bytes(config, 1, compressor.model.dtype),
    )


class ClusterIndexer:
    """
    Compresses an archive into a store on a Ray cluster, or on workers of this machine if there is none.

    Batches go to whichever worker is free. One that is lost is started again, and its batches are done again. Each
    batch is a shard in the folder of the store, which the index takes in at the end, or at the next run if this
    process is killed.

    Args:
        store (`str` or `os.PathLike`):
            Folder of the store, which all machines reach under this path.
        model (`str`):
            Folder, which all machines reach, or Hub id.
        num_workers (`int`, *optional*):
            Workers, one a GPU, or one a CPU where there are no GPUs: as many as there are by default.
        shard_images (`int`, *optional*, defaults to 512):
            Images or frames of a shard, and of a batch.
        eight_bit (`bool`, *optional*):
            Whether a new store keeps keys and values in 8 bits.
        options:
            Further arguments of [`VoCoCompressor`]: `num_voco_tokens`, `num_frames`, `batch_size`, ...

    Raises:
        ValueError: if there is no such model, or the store is of another.
        RuntimeError: if no worker can run the model.
        OSError: if the store cannot be written.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        model: str,
        num_workers: int | None = None,
        shard_images: int = 512,
        eight_bit: bool | None = None,
        **options: Any,
    ):
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level="ERROR")
        # Workers run in folders of their own
        self.options = {"model": os.path.abspath(model) if os.path.isdir(model) else model, **options}
        self.shard_images = shard_images
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.num_workers = num_workers or num_gpus or max(1, num_cpus)
        # A little of each CPU is left to those who read
        self.resources = {"num_gpus": 1, "num_cpus": 0.9} if num_gpus else {"num_cpus": 0.9}
        self.described: Described = self._ask_a_worker()
        self.store = VoCoStore(os.path.abspath(store), self.described.fingerprint, eight_bit)

    def _ask_a_worker(self) -> Described:
        try:
            return ray.get(ray.remote(**self.resources)(describe).remote(self.options))
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, (ValueError, OSError, ImportError)):
                raise cause from None
            raise RuntimeError(f"no worker can run {self.options['model']}: {_last_line(error)}") from error

    def select(self, archive: Archive) -> list[File]:
        """Files that are new or have changed."""
        return [file for file in archive.files if not self._is_known(file)]

    def _is_known(self, file: File) -> bool:
        sampling = self.described.sampling.of(file.source)
        return self.store.is_known(file.source, self.described.num_voco_tokens, sampling, file.size, file.version)

    def run(self, files: Iterable[File], tables: Iterable[str] = ()) -> Iterator[Indexed]:
        """
        Compresses files, and what is in Parquet files and tars.

        Yields:
            [`Indexed`]: What became of each, in no order.

        Raises:
            RuntimeError: if workers are lost again and again. What is done is in the store.
        """
        parts = [self._files(list(files)), self._tables(list(tables))]
        found = [part for part in parts if part is not None]
        if found:
            yield from self.run_dataset(found[0].union(*found[1:]) if found[1:] else found[0])

    def run_dataset(self, dataset: Dataset) -> Iterator[Indexed]:
        """
        Compresses a data set of Ray.

        Args:
            dataset (`ray.data.Dataset`):
                Rows with `source`, a name, and `data`, the bytes of an image or a video.

        Yields:
            [`Indexed`]: What became of each row, in no order.

        Raises:
            RuntimeError: if workers are lost again and again. What is done is in the store.
        """
        known = [ray.put(self.store.addresses(self.described.num_voco_tokens))]
        options = {**self.options, "eight_bit": self.store.eight_bit}
        done = dataset.map_batches(
            ShardWriter,
            fn_constructor_args=(str(self.store.path), options, known, self.shard_images),
            batch_size=self.shard_images,
            batch_format="pyarrow",
            concurrency=self.num_workers,
            # By default Ray tries for ever. These two have no other way in; it goes with Ray 2.64
            max_restarts=-1,
            max_task_retries=RETRIES,
            **self.resources,
        )
        try:
            yield from self._follow(done)
        except RayError as error:
            raise RuntimeError(
                f"workers were lost, what is done is in {self.store.path}: {_last_line(error)}"
            ) from error
        finally:
            self.store.adopt()

    def _follow(self, done: Dataset) -> Iterator[Indexed]:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        contents: list[Content] = []
        failures: dict[str, str] = {}
        try:
            for batch in done.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    source = os.fsdecode(row["source"])
                    if row["error"] is not None:
                        failures[source] = row["error"]
                    else:
                        contents.append(
                            Content(row["content_hash"], row["sampling"], source, row["size"], row["mtime_ns"])
                        )
                    yield Indexed(source, row["num_images"], row["num_tokens"], row["error"])
        finally:
            self.store.record(contents)
            self.store.record_failures(failures)

    def _files(self, files: list[File]) -> Dataset | None:
        if not files:
            return None
        # Each block is one task: enough of them that all have work
        size = max(1, min(self.shard_images, -(-len(files) // self.num_workers)))
        rows = [{"source": os.fsencode(file.source), "version": file.version} for file in files]
        blocks = [pa.Table.from_pylist(rows[i : i + size], schema=INPUT) for i in range(0, len(rows), size)]
        return ray.data.from_arrow(blocks)

    def _tables(self, tables: list[str]) -> Dataset | None:
        if not tables:
            return None
        names = [pa.table({"source": pa.array([os.fsencode(name)], pa.binary())}) for name in tables]
        read = partial(_read_tables, rows_at_a_time=self.shard_images)
        return ray.data.from_arrow(names).map_batches(read, batch_size=1, batch_format="pyarrow", num_cpus=0.1)


def _read_tables(batch: pa.Table, rows_at_a_time: int) -> Iterator[pa.Table]:
    """Rows of Parquet files and tars; one that is damaged is a row that says so, behind those that can be read."""
    for name in batch.column("source").to_pylist():
        rows: list[dict[str, Any]] = []
        try:
            for source, data in read_table(os.fsdecode(name)):
                rows.append({"source": os.fsencode(source), "version": 0, "data": data})
                if len(rows) == rows_at_a_time:
                    yield pa.Table.from_pylist(rows, schema=INPUT)
                    rows = []
        except (ValueError, OSError) as error:
            rows.append({"source": name, "error": str(error)})
        yield pa.Table.from_pylist(rows, schema=INPUT)


def _item(row: dict[str, Any]) -> Item:
    source = row["source"] if isinstance(row["source"], str) else os.fsdecode(row["source"] or b"")
    return Item(source, partial(_read, source, row), row.get("version") or 0)


def _read(source: str, row: dict[str, Any]) -> Path | bytes:
    if row.get("error") is not None:
        raise ValueError(row["error"])
    return read_source(source) if row.get("data") is None else row["data"]


def _row(outcome: Outcome) -> dict[str, Any]:
    content = outcome.content
    row = {"source": os.fsencode(outcome.source), "num_images": 0, "num_tokens": 0, "error": outcome.error}
    if content is None:
        return row
    said = {name: getattr(content, name) for name in ("content_hash", "sampling", "size", "mtime_ns")}
    if (cache := outcome.cache) is None:
        return row | said
    return row | said | {"num_images": len(cache) if content.is_video else 1, "num_tokens": sum(cache.token_counts)}


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


__all__ = ["ClusterIndexer", "ShardWriter"]
