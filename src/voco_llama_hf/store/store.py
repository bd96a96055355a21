"""`VoCoStore`: a folder of shards and an index of what is in them."""

import dataclasses
import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..files import inside, remove_abandoned
from ..modeling.cache_voco_llama import VoCoCache, digest
from ..modeling.fingerprint_voco_llama import check_fingerprint
from .content import Content, Sampled
from .errors import DamagedError
from .index import DamagedRow, Index, Row
from .places import INDEX, SHARDS, LocalPlace, Place, RemotePlace, is_url
from .rows import Packed
from .shards import ASIDE, Record, Shard, pack, save_shard, single_k, write_shard


COMPACT_TOKENS = 4_096  # VoCo tokens that a shard of compact has at least
HASH_DIGITS = 8  # of a hash that make a name
OLD_PARTS = re.compile(r"[0-9a-f]{32}\.part|\.tmp\w{6}")  # what killed writers of the first version left
PART_SECONDS = 3_600  # without a change, after which nobody is writing these any more

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry(Sampled):
    """
    What a [`VoCoStore`] holds of an image or a video.

    Args:
        content_hash (`str`): SHA-256 of its bytes or pixels.
        num_voco_tokens (`int`): VoCo tokens of an image or frame.
        sampling (`str`): How the frames of a video were chosen; see [`Content`] for an image.
        num_images (`int`): 1 for an image or its tiles, frames of a video.
        size (`int`): Bytes of the source.
        metadata (`dict`): What was given when it was added.
        added (`str`): When it was compressed, in ISO 8601, UTC.
        sources (`tuple[str, ...]`): Where the same content was found.
    """

    content_hash: str
    num_voco_tokens: int
    sampling: str
    num_images: int
    size: int
    metadata: dict[str, Any]
    added: str
    sources: tuple[str, ...]


class VoCoStore:
    r"""
    A folder of compressed images and videos, each stored once, under the hash of its content and its k.

    One process writes at a time, any number read meanwhile, also where nothing can be written. A write is all or
    nothing: a shard is on the disk under its name before it is in the index, and one that a killed writer left is
    taken into the index by the next. Reading deletes nothing.

    Args:
        path (`str` or `os.PathLike`):
            The folder. It is made if `fingerprint` says for which model. A URL of fsspec, as in
            `"s3://bucket/photos.voco"`, is read only: the index is fetched once, shards by range.
        fingerprint (`dict[str, str]`, *optional*):
            `model.fingerprint()` of the model that the entries are to be used with.
        eight_bit (`bool`, *optional*):
            Whether a new store keeps keys and values in 8 bits, with a scale for every head of every token: half the
            bytes of 16 bits.
        storage_options (`dict`, *optional*):
            What the file system of a URL takes, as keys and an endpoint.

    Raises:
        FileNotFoundError: if there is no store and no `fingerprint` to make one.
        ValueError: if the store was made by another model or with another `eight_bit`.
        DamagedError: if its index is damaged; it is a `ValueError`.
        OSError: if it cannot be read or made: a full disk, a failing one, no permission.

    Example:

    ```python
    >>> store = VoCoStore("photos", model.fingerprint())
    >>> store.add([Content.of_file("cat.png")], [model.compress(pixel_values, num_voco_tokens=2)])
    >>> cache = store.get(hash_file("cat.png"))
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=cache, return_tensors="pt")
    >>> model.generate(**inputs, voco_cache=cache)
    ```"""

    def __init__(
        self,
        path: str | os.PathLike,
        fingerprint: dict[str, str] | None = None,
        eight_bit: bool | None = None,
        storage_options: dict[str, Any] | None = None,
    ):
        self._open_shards: OrderedDict[str, tuple[tuple, Shard]] = OrderedDict()
        self.left_out: dict[str, str] = {}
        self.path: Path | str
        self._place: Place
        if is_url(path):
            self._place = place = RemotePlace(str(path), storage_options)
            self.path = place.url
            self._index = self._open_remote(place)
        else:
            self.path = Path(path)
            self.shards = self.path / SHARDS
            self._place = LocalPlace(self.shards)
            self._index = self._open_local(self.path, fingerprint, eight_bit)
        try:
            self.fingerprint, self.eight_bit = self._read_about()
            if fingerprint is not None:
                check_fingerprint(self.fingerprint, fingerprint, "this one", what=f"the store {self.path}")
            if eight_bit is not None and eight_bit != self.eight_bit:
                kept = "in 8 bits" if self.eight_bit else "as they were computed"
                raise ValueError(f"the store {self.path} keeps keys and values {kept}, which cannot be changed")
            try:
                self.adopt()
            except OSError as error:
                # What is in the index can be read all the same
                logger.warning("new shards stay out of the index of %s for now: %s", self.path, error)
        except BaseException:
            self.close()
            raise

    def _open_local(self, path: Path, fingerprint: dict[str, str] | None, eight_bit: bool | None) -> Index:
        about = None
        if fingerprint is not None:
            about = {"fingerprint": json.dumps(fingerprint), "eight_bit": json.dumps(bool(eight_bit))}
        if not os.path.lexists(path / INDEX):
            if fingerprint is None:
                raise FileNotFoundError(f"no VoCoStore at {path}")
            self.shards.mkdir(parents=True, exist_ok=True)
        if self.shards.is_symlink():
            raise DamagedError(f"{self.shards} is a link, not a folder")
        return Index(path / INDEX, about)

    @staticmethod
    def _open_remote(place: RemotePlace) -> Index:
        try:
            return Index(place.fetch_index(), obstacle=f"{place.url} is not a folder of this machine")
        except BaseException:
            place.close()
            raise

    def _read_about(self) -> tuple[dict[str, str], bool]:
        try:
            fingerprint = json.loads(self._index.about["fingerprint"])
            eight_bit = json.loads(self._index.about["eight_bit"])
            if not isinstance(fingerprint, dict) or not all(isinstance(text, str) for text in fingerprint.values()):
                raise ValueError("the fingerprint is no object of texts")
            if not isinstance(eight_bit, bool):
                raise ValueError(f"eight_bit is {eight_bit!r:.40}")
        except (KeyError, ValueError, RecursionError) as error:
            raise DamagedError(f"{self.path}/{INDEX} is damaged: {error}") from error
        return fingerprint, eight_bit

    def close(self) -> None:
        self._index.close()
        self._close_shards(list(self._open_shards))
        self._place.close()

    def __enter__(self) -> "VoCoStore":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, entries={len(self)}, nbytes={self.nbytes})"

    # Reading

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Entry]:
        """Entries in the order of the shards. Rows of the index that are damaged are left out."""
        sources: dict[str, tuple[str, ...]] = {}  # shared: a content may be stored at many k
        return (self._entry(row, sources) for row in self._index.rows() if isinstance(row, Row))

    def __contains__(self, content_hash: str) -> bool:
        return self.contains(content_hash)

    def contains(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> bool:
        """Whether a content is stored, at any k and sampling unless they are named."""
        return any(isinstance(row, Row) for row in self._index.rows(content_hash, num_voco_tokens, sampling))

    def get(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> VoCoCache:
        """
        A compressed image, or the frames of a video.

        Args:
            content_hash (`str`):
                Its hash, see [`hash_file`] and [`hash_pixels`].
            num_voco_tokens (`int`, *optional*):
                Its k, if the content is stored at several.
            sampling (`str`, *optional*):
                Its sampling, if a video is stored with several.

        Raises:
            KeyError: if it is not stored.
            ValueError: if there are several.
            DamagedError: if it is damaged; `add` with `replace=True` puts a new one in its place.
            OSError: if it cannot be read.
        """
        rows = list(self._index.rows(content_hash, num_voco_tokens, sampling))
        if len(rows) > 1:
            found = ", ".join(f"k={row.num_voco_tokens} {row.sampling}".strip() for row in rows)
            raise ValueError(f"{content_hash} is stored more than once: say which of {found}")
        if not rows:
            raise KeyError(f"{content_hash} is not in the store {self.path}")
        return self._read(rows[0], self._read_row)

    def find(self, name: str) -> list[Entry]:
        """
        Entries by what a person calls them: a source, the last parts of its path, or the first digits of a hash.

        Args:
            name (`str`): As in `"/photos/cat.png"`, `"cat.png"` or `"3f9a2c41"`.
        """
        exact = [self._index.source(path) for path in dict.fromkeys((name, os.path.abspath(name)))]
        found = [row for row in exact if row is not None and row["error"] is None]
        found = found or [row for row in self._index.sources_ending(name) if row["error"] is None]
        hashes = [row["content_hash"] for row in found]
        if not hashes and len(name) >= HASH_DIGITS:
            hashes = self._index.hashes_starting(name)
        rows = (row for content_hash in dict.fromkeys(hashes) for row in self._index.rows(content_hash))
        return [self._entry(row) for row in rows if isinstance(row, Row)]

    def failures(self) -> dict[str, str]:
        """Sources that could not be read, with the reason."""
        return self._index.failures()

    def is_known(self, source: str, num_voco_tokens: int, sampling: str, size: int, mtime_ns: int) -> bool:
        """Whether a file is stored and has not changed since, judged by its size and time."""
        row = self._index.source(source)
        if row is None or (row["size"], row["mtime_ns"]) != (size, mtime_ns) or row["content_hash"] is None:
            return False
        return self.contains(row["content_hash"], num_voco_tokens, sampling)

    def addresses(self, num_voco_tokens: int) -> set[tuple[str, str]]:
        """Content hash and sampling of all that is stored at one k."""
        rows = self._index.rows(num_voco_tokens=num_voco_tokens)
        return {(row.content_hash, row.sampling) for row in rows if isinstance(row, Row)}

    @property
    def nbytes(self) -> int:
        """Bytes that the shards take on the disk, with what killed writers have left until the next one comes."""
        return self._place.nbytes()

    # Writing

    def add(self, contents: Sequence[Content], caches: Sequence[VoCoCache], replace: bool = False) -> int:
        """
        Stores compressed images and videos in one shard. What is there already is left as it is.

        Args:
            contents (`Sequence[Content]`):
                What each entry is.
            caches (`Sequence[VoCoCache]`):
                One cache an entry: of one image, or of the frames of a video.
            replace (`bool`, *optional*, defaults to `False`):
                Whether they take the place of what is there, which may be damaged.

        Returns:
            `int`: How many entries are new.

        Raises:
            ValueError: if a cache was made by another model than the store, or an entry has several k.
            NotWritableError: if the store can be read only; it is an `OSError`.
            TimeoutError: if another process writes and does not come to an end; it is an `OSError`.
            OSError: if the disk is full or fails. Nothing is changed then.
        """
        for cache in caches:
            check_fingerprint(cache.fingerprint, self.fingerprint, f"the store {self.path}")
        with self._write():
            new: dict[tuple, tuple[Content, VoCoCache]] = {}
            for content, cache in zip(contents, caches, strict=True):
                key = content.content_hash, single_k(cache), content.sampling
                if replace or not self.contains(*key):
                    new.setdefault(key, (content, cache))
            if new:
                fresh = list(zip(*new.values()))
                path, records = write_shard(self.shards, fresh[0], fresh[1], self.eight_bit)
                for key in new:
                    self._index.delete(*key)
                self._index.insert_shard(path.name, records)
                self._index.drop_empty_shards()
            self._index.record(contents)
        return len(new)

    def add_packed(self, entries: Sequence[Packed], replace: bool = False) -> int:
        """
        Stores entries as another store has them, in 8 bits or not as this one keeps them, with [`VoCoStore.add`]'s
        promises.

        Returns:
            `int`: How many are new.
        """
        for entry in entries:
            check_fingerprint(entry.fingerprint, self.fingerprint, f"the store {self.path}")
        contents = [
            dataclasses.replace(entry.record.content, source=source) for entry in entries for source in entry.sources
        ]
        with self._write():
            new: dict[tuple, Packed] = {}
            for entry in entries:
                content, k = entry.record.content, entry.record.num_voco_tokens
                key = content.content_hash, k, content.sampling
                if replace or not self.contains(*key):
                    new.setdefault(key, self._repacked(entry))
            for key in new:
                self._index.delete(*key)
            for dtype in dict.fromkeys(entry.dtype for entry in new.values()):
                self._insert_packed([entry for entry in new.values() if entry.dtype == dtype], dtype)
            self._index.drop_empty_shards()
            self._index.record(contents)
        return len(new)

    def _repacked(self, entry: Packed) -> Packed:
        if ("key_scales" in entry.tensors) == self.eight_bit:
            return entry
        tensors = pack(entry.unpack(), self.eight_bit)
        record = dataclasses.replace(entry.record, sha256=digest(*tensors.values()))
        return dataclasses.replace(entry, record=record, tensors=tensors)

    def _insert_packed(self, entries: Sequence[Packed], dtype: torch.dtype) -> None:
        records, start = [], 0
        for entry in entries:
            records.append(dataclasses.replace(entry.record, first_token=start))
            start += entry.record.num_tokens
        path = save_shard(self.shards, [entry.tensors for entry in entries], records, self.fingerprint, dtype)
        self._index.insert_shard(path.name, records)

    def adopt(self) -> None:
        """
        Takes shards into the index that other processes, or a killed one, have left in the folder. Those that are
        damaged or of another model are left where they are, and named in `left_out`.
        """
        if not self._index.obstacle and self._unknown_shards():
            with self._index.transaction():
                self._adopt()

    def record(self, contents: Iterable[Content]) -> None:
        """Remembers sources of contents that are stored."""
        with self._write():
            self._index.record(contents)

    def record_failures(self, failures: dict[str, str]) -> None:
        """Remembers sources that could not be read, and why."""
        with self._write():
            self._index.record_failures(failures)

    def remove(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> int:
        """
        Forgets a content, at every k and sampling unless they are named. [`VoCoStore.compact`] frees its bytes.

        Returns:
            `int`: How many entries were removed.

        Raises:
            OSError: if the store cannot be written. Nothing is changed then.
        """
        with self._write():
            number = self._index.delete(content_hash, num_voco_tokens, sampling)
            if not list(self._index.rows(content_hash)):
                self._index.forget_sources(content_hash)
            self._index.drop_empty_shards()
        return number

    def compact(self) -> int:
        """
        Writes small shards, and those with removed entries, together into large ones. Damaged ones stay as they are.

        Returns:
            `int`: Bytes that were freed.

        Raises:
            OSError: if the store cannot be written. Nothing is lost then.
        """
        before = self.nbytes
        with self._write():
            for rows in self._rows_to_compact():
                self._rewrite(rows)
            self._index.drop_empty_shards()
        return before - self.nbytes

    def verify(self) -> Iterator[tuple[Entry, DamagedError | OSError | None]]:
        """
        Reads every entry: what it is, and what is wrong with it, if anything is.

        Raises:
            DamagedError: if the index itself is damaged.
        """
        self._index.check()
        for row in self._index.rows():
            problem: DamagedError | OSError | None = None
            try:
                self._read(row, self._read_row)
            except KeyError:
                continue  # removed since
            except (DamagedError, OSError) as error:
                problem = error
            yield self._entry(row), problem

    def sources(self) -> list[str]:
        """Where all that is stored was found."""
        return [row["source"] for row in self._index.sources("error IS NULL")]

    def packed(self) -> Iterator[tuple[Entry, Packed | DamagedError | OSError]]:
        """
        Every entry as it is stored, or what is wrong with it.

        Raises:
            DamagedError: if the index itself is damaged.
        """
        self._index.check()
        for row in self._index.rows():
            entry = self._entry(row)
            try:
                yield entry, self._read(row, self._pack_row)
            except KeyError:
                continue  # removed since
            except (DamagedError, OSError) as error:
                yield entry, error

    # How it is done

    @contextmanager
    def _write(self) -> Iterator[None]:
        """The only writer; first it takes in what others have left in the folder."""
        with self._index.transaction():
            self._adopt()
            yield
        try:
            self._clean()
        except OSError as error:
            # What was to be written is written
            logger.warning("files that %s does not need any more stay for now: %s", self.path, error)

    def _adopt(self) -> None:
        for name in sorted(self._unknown_shards()):
            try:
                shard = Shard(self._place.open(name))
                check_fingerprint(shard.fingerprint, self.fingerprint, f"the store {self.path}", what=f"shard {name}")
                records = shard.records()
                shard.close()
            except (ValueError, FileNotFoundError) as error:
                if self.left_out.setdefault(name, str(error)) == str(error):
                    logger.warning("left out of the store %s: %s", self.path, error)
                continue
            self._index.insert_shard(name, records)
            self._index.record((record.content for record in records), unless_newer=True)
        self._index.drop_empty_shards()

    def _unknown_shards(self) -> set[str]:
        return self._place.names() - self._index.shard_names()

    def _clean(self) -> None:
        """Removes files of shards that were dropped, and what killed writers have left."""
        gone = []
        for shard, name in self._index.dropped():
            try:
                path = inside(self.shards, name)
            except ValueError:
                gone.append(shard)  # no shard of ours has such a name
                continue
            self._close_shards([path.name])
            if path.suffix == ".safetensors":
                path.unlink(missing_ok=True)
            gone.append(shard)
        if gone:
            with self._index.transaction():
                self._index.forget_shards(gone)
        remove_abandoned(self.shards, ASIDE)
        for path in self.shards.iterdir():
            if OLD_PARTS.fullmatch(path.name) and time.time() - path.lstat().st_mtime > PART_SECONDS:
                path.unlink(missing_ok=True)

    def _rows_to_compact(self) -> Iterator[list[Row]]:
        """Entries of small shards and of shards with removed entries, as many together as a shard is to have."""
        batches: dict[torch.dtype, list[list[Row]]] = {}
        intact = (row for row in self._index.rows() if isinstance(row, Row))
        for name, group in groupby(intact, key=lambda row: row.shard):
            rows = list(group)
            if (shard := self._sound_shard(name)) is None:
                continue
            tokens, is_whole = _num_tokens(rows), _num_tokens(rows) == shard.num_tokens
            if is_whole and tokens >= COMPACT_TOKENS:
                continue
            batch = batches.setdefault(shard.dtype, [])
            batch.append(rows)
            if sum(map(_num_tokens, batch)) >= COMPACT_TOKENS:
                yield [row for rows in batches.pop(shard.dtype) for row in rows]
        for batch in batches.values():
            # One whole shard alone is as compact as can be
            if len(batch) > 1 or _num_tokens(batch[0]) < self._shard(batch[0][0].shard).num_tokens:
                yield [row for rows in batch for row in rows]

    def _sound_shard(self, name: str) -> Shard | None:
        try:
            return self._shard(name)
        except (DamagedError, FileNotFoundError):
            return None

    def _rewrite(self, rows: list[Row]) -> None:
        """Moves entries to a new shard, as they are stored; damaged ones stay."""
        packed, moved = [], []
        for row in rows:
            try:
                packed.append(self._pack_row(row))
            except DamagedError:
                continue
            moved.append(row)
        if moved:
            self._index.delete_rows(moved)
            self._insert_packed(packed, packed[0].dtype)

    def _entry(self, row: Row | DamagedRow, known: dict[str, tuple[str, ...]] | None = None) -> Entry:
        if isinstance(row, DamagedRow):
            return Entry(row.content_hash, row.num_voco_tokens, row.sampling, 0, 0, {}, "", ())
        known = {} if known is None else known
        if row.content_hash not in known:
            known[row.content_hash] = self._index.sources_of(row.content_hash)
        return Entry(
            row.content_hash,
            row.num_voco_tokens,
            row.sampling,
            row.num_images,
            row.size,
            row.metadata,
            row.added,
            known[row.content_hash],
        )

    def _read_row(self, row: Row) -> VoCoCache:
        return self._shard(row.shard).read(row.first_token, row.num_images, row.num_voco_tokens, row.sha256)

    def _pack_row(self, row: Row) -> Packed:
        shard, sources = self._shard(row.shard), self._index.sources_of(row.content_hash)
        content = Content(row.content_hash, row.sampling, next(iter(sources), ""), row.size, 0, row.metadata)
        record = Record(content, row.num_voco_tokens, row.num_images, 0, row.sha256, row.added)
        tensors = shard.tensors(row.first_token, row.num_tokens, row.sha256)
        return Packed(record, tensors, shard.dtype, shard.fingerprint, sources)

    def _read(self, row: Row | DamagedRow, how: Callable[[Row], T]) -> T:
        """An entry, also if another process has compacted the store since the index was read."""
        while True:
            if isinstance(row, DamagedRow):
                raise row.problem
            try:
                return how(row)
            except FileNotFoundError as error:
                rows = list(self._index.rows(row.content_hash, row.num_voco_tokens, row.sampling))
                if not rows:
                    raise KeyError(f"{row.content_hash} is not in the store {self.path} any more") from error
                # The index is written before a file goes, so an entry that has not moved is lost
                if isinstance(rows[0], Row) and rows[0].shard == row.shard:
                    hint = ", or it has changed since it was opened" if is_url(self.path) else ""
                    raise DamagedError(f"the store {self.path} is damaged: {row.shard} is missing{hint}") from error
                row = rows[0]

    def _shard(self, name: str) -> Shard:
        """A shard by its name in the index; the ones used last stay open."""
        version = self._place.version(name)
        known, shard = self._open_shards.pop(name, (None, None))
        if shard is None or known != version:
            self._close_shards([name])
            shard = Shard(self._place.open(name))
            try:
                check_fingerprint(shard.fingerprint, self.fingerprint, f"the store {self.path}", f"its shard {name}")
            except ValueError as error:
                raise DamagedError(str(error)) from error
        self._open_shards[name] = version, shard
        self._close_shards(list(self._open_shards)[: -self._place.max_open])
        return shard

    def _close_shards(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._open_shards:
                self._open_shards.pop(name)[1].close()


def _num_tokens(rows: Sequence[Row]) -> int:
    return sum(row.num_tokens for row in rows)


__all__ = ["Entry", "VoCoStore"]
