"""`VoCoStore`: a folder of shards and an SQLite index of what is in them."""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ..modeling.cache_voco_llama import VoCoCache
from ..modeling.fingerprint_voco_llama import check_fingerprint
from .content import Content
from .shards import Record, Shard, save_shard, single_k, write_shard


INDEX, SHARDS = "index.sqlite", "shards"
VERSION = "1"
COMPACT_TOKENS = 4_096  # VoCo tokens that a shard of compact has at least
HASH_DIGITS = 8  # of a hash that make a name
PART_SECONDS = 3_600  # without a change, after which nobody is writing a shard any more

SCHEMA = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE shards (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, dropped INTEGER NOT NULL DEFAULT 0);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    content_hash TEXT NOT NULL,
    num_voco_tokens INTEGER NOT NULL,
    sampling TEXT NOT NULL,
    num_images INTEGER NOT NULL,
    size INTEGER NOT NULL,
    metadata TEXT NOT NULL,
    added TEXT NOT NULL,
    shard INTEGER NOT NULL REFERENCES shards,
    first_token INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    UNIQUE (content_hash, num_voco_tokens, sampling)
);
CREATE INDEX entries_of_shard ON entries (shard);
CREATE TABLE sources (
    source TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content_hash TEXT, error TEXT
);
CREATE INDEX sources_of_content ON sources (content_hash);
"""


@dataclass(frozen=True)
class Entry:
    """
    What a [`VoCoStore`] holds of an image or a video.

    Args:
        content_hash (`str`): SHA-256 of its bytes or pixels.
        num_voco_tokens (`int`): VoCo tokens of an image or frame.
        sampling (`str`): How the frames of a video were chosen; empty for an image.
        num_images (`int`): 1 for an image, frames of a video.
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

    @property
    def is_video(self) -> bool:
        return self.sampling != ""


class VoCoStore:
    r"""
    A folder of compressed images and videos, each stored once, under the hash of its content and its k.

    One process writes at a time, any number read meanwhile. A write is all or nothing: a shard is on the disk under
    its name before it is in the index, and one that a killed writer left is taken into the index by the next.

    Args:
        path (`str` or `os.PathLike`):
            The folder. It is made if `fingerprint` says for which model.
        fingerprint (`dict[str, str]`, *optional*):
            `model.fingerprint()` of the model that the entries are to be used with.
        eight_bit (`bool`, *optional*):
            Whether a new store keeps keys and values in 8 bits, with a scale for every head of every token: half the
            bytes of 16 bits.

    Raises:
        FileNotFoundError: if there is no store and no `fingerprint` to make one.
        ValueError: if the store was made by another model, with another `eight_bit`, or is damaged.

    Example:

    ```python
    >>> store = VoCoStore("photos", model.fingerprint())
    >>> store.add([Content.of_file("cat.png")], [model.compress(pixel_values, num_voco_tokens=2)])
    >>> cache = store.get(hash_file("cat.png"))
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=cache, return_tensors="pt")
    >>> model.generate(**inputs, voco_cache=cache)
    ```"""

    def __init__(
        self, path: str | os.PathLike, fingerprint: dict[str, str] | None = None, eight_bit: bool | None = None
    ):
        self.path = Path(path)
        self.shards = self.path / SHARDS
        if not (self.path / INDEX).is_file():
            if fingerprint is None:
                raise FileNotFoundError(f"no VoCoStore at {self.path}")
            self.shards.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(self.path / INDEX, timeout=60, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            with self._transaction():
                if self._db.execute("PRAGMA schema_version").fetchone()[0] == 0:
                    self._create(fingerprint, eight_bit)
            about = dict(self._db.execute("SELECT name, value FROM about"))
            if about["version"] != VERSION:
                raise ValueError(f"{self.path} has VoCoStore version {about['version']}, this package reads {VERSION}")
            self.fingerprint: dict[str, str] = json.loads(about["fingerprint"])
            self.eight_bit: bool = json.loads(about["eight_bit"])
        except (sqlite3.DatabaseError, KeyError) as error:
            raise ValueError(f"{self.path / INDEX} is damaged: {error}") from error
        if fingerprint is not None:
            check_fingerprint(self.fingerprint, fingerprint, "this one", what=f"the store {self.path}")
        if eight_bit is not None and eight_bit != self.eight_bit:
            kept = "in 8 bits" if self.eight_bit else "as they were computed"
            raise ValueError(f"the store {self.path} keeps keys and values {kept}, which cannot be changed")
        self.adopt()

    def _create(self, fingerprint: dict[str, str] | None, eight_bit: bool | None) -> None:
        if fingerprint is None:
            raise ValueError(f"{self.path / INDEX} is empty")
        for statement in filter(str.strip, SCHEMA.split(";")):
            self._db.execute(statement)
        about = {
            "version": VERSION,
            "fingerprint": json.dumps(fingerprint),
            "eight_bit": json.dumps(bool(eight_bit)),
        }
        self._db.executemany("INSERT INTO about VALUES (?, ?)", about.items())

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "VoCoStore":
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, entries={len(self)}, nbytes={self.nbytes})"

    # Reading

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM entries").fetchone()[0]

    def __iter__(self) -> Iterator[Entry]:
        return map(self._entry, self._select("1"))

    def __contains__(self, content_hash: str) -> bool:
        return self.contains(content_hash)

    def contains(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> bool:
        """Whether a content is stored, at any k and sampling unless they are named."""
        return bool(self._rows(content_hash, num_voco_tokens, sampling))

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
            ValueError: if there are several, or it is damaged.
        """
        rows = self._rows(content_hash, num_voco_tokens, sampling)
        if len(rows) > 1:
            found = ", ".join(f"k={row['num_voco_tokens']} {row['sampling']}".strip() for row in rows)
            raise ValueError(f"{content_hash} is stored more than once: say which of {found}")
        if not rows:
            raise KeyError(f"{content_hash} is not in the store {self.path}")
        return self._read(rows[0])

    def find(self, name: str) -> list[Entry]:
        """
        Entries by what a person calls them: a source, the last parts of its path, or the first digits of a hash.

        Args:
            name (`str`): As in `"/photos/cat.png"`, `"cat.png"` or `"3f9a2c41"`.
        """
        known = "SELECT content_hash FROM sources WHERE error IS NULL"
        exact, ending = f"{known} AND source IN (?, ?)", f"{known} AND substr(source, -length(?1)) = ?1"
        starting = "SELECT DISTINCT content_hash FROM entries WHERE substr(content_hash, 1, length(?1)) = ?1"
        hashes = self._db.execute(exact, (name, os.path.abspath(name))).fetchall()
        hashes = hashes or self._db.execute(ending, (os.sep + name,)).fetchall()
        if not hashes and len(name) >= HASH_DIGITS:
            hashes = self._db.execute(starting, (name,)).fetchall()
        return [self._entry(row) for (content_hash,) in dict.fromkeys(hashes) for row in self._rows(content_hash)]

    def failures(self) -> dict[str, str]:
        """Sources that could not be read, with the reason."""
        return dict(self._db.execute("SELECT source, error FROM sources WHERE error IS NOT NULL ORDER BY source"))

    def is_known(self, source: str, num_voco_tokens: int, sampling: str, size: int, mtime_ns: int) -> bool:
        """Whether a file is stored and has not changed since, judged by its size and time."""
        row = self._db.execute(
            "SELECT size, mtime_ns, content_hash FROM sources WHERE source = ?", (source,)
        ).fetchone()
        if row is None or row[:2] != (size, mtime_ns) or row[2] is None:
            return False
        return self.contains(row[2], num_voco_tokens, sampling)

    def addresses(self, num_voco_tokens: int) -> set[tuple[str, str]]:
        """Content hash and sampling of all that is stored at one k."""
        select = "SELECT content_hash, sampling FROM entries WHERE num_voco_tokens = ?"
        return set(self._db.execute(select, (num_voco_tokens,)))

    @property
    def nbytes(self) -> int:
        """Bytes that the shards take on the disk."""
        return sum(path.stat().st_size for path in self.shards.glob("*.safetensors"))

    # Writing

    def add(self, contents: Sequence[Content], caches: Sequence[VoCoCache]) -> int:
        """
        Stores compressed images and videos in one shard. What is there already is left as it is.

        Args:
            contents (`Sequence[Content]`):
                What each entry is.
            caches (`Sequence[VoCoCache]`):
                One cache an entry: of one image, or of the frames of a video.

        Returns:
            `int`: How many entries are new.

        Raises:
            ValueError: if a cache was made by another model than the store, or an entry has several k.
        """
        for cache in caches:
            check_fingerprint(cache.fingerprint, self.fingerprint, f"the store {self.path}")
        with self._write():
            new: dict[tuple, tuple[Content, VoCoCache]] = {}
            for content, cache in zip(contents, caches, strict=True):
                key = content.content_hash, single_k(cache), content.sampling
                if not self._rows(*key):
                    new.setdefault(key, (content, cache))
            if new:
                fresh = list(zip(*new.values()))
                path, records = write_shard(self.shards, fresh[0], fresh[1], self.eight_bit)
                self._insert_shard(path.name, records)
            self.record(contents)
        return len(new)

    def adopt(self) -> None:
        """Takes shards into the index that other processes, or a killed one, have left in the folder."""
        if self._unknown_shards():
            with self._write():
                pass

    def record(self, contents: Iterable[Content], unless_newer: bool = False) -> None:
        """Remembers sources of contents that are stored; `unless_newer` keeps what is known of later ones."""
        rows = [(c.source, c.size, c.mtime_ns, c.content_hash) for c in contents if c.source]
        replace = "UPDATE SET (size, mtime_ns, content_hash, error) = "
        replace += "(excluded.size, excluded.mtime_ns, excluded.content_hash, NULL)"
        later = " WHERE excluded.mtime_ns > mtime_ns" if unless_newer else ""
        insert = "INSERT INTO sources VALUES (?, ?, ?, ?, NULL) ON CONFLICT (source) DO "
        self._db.executemany(insert + replace + later, rows)

    def record_failures(self, failures: dict[str, str]) -> None:
        """Remembers sources that could not be read, and why."""
        self._db.executemany("INSERT OR REPLACE INTO sources VALUES (?, 0, 0, NULL, ?)", failures.items())

    def remove(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> int:
        """
        Forgets a content, at every k and sampling unless they are named. [`VoCoStore.compact`] frees its bytes.

        Returns:
            `int`: How many entries were removed.
        """
        with self._write():
            rows = self._rows(content_hash, num_voco_tokens, sampling)
            self._db.executemany("DELETE FROM entries WHERE id = ?", [(row["id"],) for row in rows])
            if not self._rows(content_hash):
                self._db.execute("DELETE FROM sources WHERE content_hash = ?", (content_hash,))
            self._drop_empty_shards()
        return len(rows)

    def compact(self) -> int:
        """
        Writes small shards, and those with removed entries, together into large ones.

        Returns:
            `int`: Bytes that were freed.
        """
        before = self.nbytes
        with self._write():
            for rows in self._rows_to_compact():
                self._rewrite(rows)
            self._drop_empty_shards()
        for part in self.shards.glob("*.part"):
            # What a living writer is at was touched a moment ago
            if time.time() - part.stat().st_mtime > PART_SECONDS:
                part.unlink(missing_ok=True)
        return before - self.nbytes

    def verify(self) -> Iterator[tuple[Entry, str | None]]:
        """Reads every entry: what it is, and what is wrong with it, if anything is."""
        for row in self._select("1"):
            problem = None
            try:
                self._read(row)
            except KeyError:
                continue  # removed since
            except ValueError as error:
                problem = str(error)
            yield self._entry(row), problem

    # The index

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextmanager
    def _write(self) -> Iterator[None]:
        """The only writer; first it takes in what others have left in the folder."""
        with self._transaction():
            for name in sorted(self._unknown_shards()):
                shard = Shard(self.shards / name)
                check_fingerprint(shard.fingerprint, self.fingerprint, f"the store {self.path}", what=f"shard {name}")
                records = list(shard.records())
                self._insert_shard(name, records)
                self.record((record.content for record in records), unless_newer=True)
            self._drop_empty_shards()
            yield
        self._unlink_dropped()

    def _unknown_shards(self) -> set[str]:
        known = {name for (name,) in self._db.execute("SELECT name FROM shards")}
        return {path.name for path in self.shards.glob("*.safetensors")} - known

    def _insert_shard(self, name: str, records: Sequence[Record]) -> None:
        shard = self._db.execute("INSERT INTO shards (name) VALUES (?)", (name,)).lastrowid
        rows = [
            (
                record.content.content_hash,
                record.num_voco_tokens,
                record.content.sampling,
                record.num_images,
                record.content.size,
                json.dumps(record.content.metadata),
                record.added,
                shard,
                record.first_token,
                record.sha256,
            )
            for record in records
        ]
        columns = (
            "content_hash, num_voco_tokens, sampling, num_images, size, metadata, added, shard, first_token, sha256"
        )
        marks = ", ".join("?" * len(columns.split()))
        self._db.executemany(f"INSERT OR IGNORE INTO entries ({columns}) VALUES ({marks})", rows)

    def _drop_empty_shards(self) -> None:
        self._db.execute("UPDATE shards SET dropped = 1 WHERE id NOT IN (SELECT shard FROM entries)")

    def _unlink_dropped(self) -> None:
        """A dropped shard stays in the index until its file is gone, so that nobody takes it in again."""
        for shard, name in self._db.execute("SELECT id, name FROM shards WHERE dropped").fetchall():
            (self.shards / name).unlink(missing_ok=True)
            self._db.execute("DELETE FROM shards WHERE id = ?", (shard,))

    def _rows_to_compact(self) -> Iterator[list[sqlite3.Row]]:
        """Entries of small shards and of shards with removed entries, as many together as a shard is to have."""
        batches: dict[torch.dtype, list[list[sqlite3.Row]]] = {}
        for _, group in groupby(self._select("1"), key=lambda row: row["shard"]):
            rows = list(group)
            shard = Shard(self.shards / rows[0]["name"])
            tokens, is_whole = _num_tokens(rows), _num_tokens(rows) == shard.num_tokens
            if is_whole and tokens >= COMPACT_TOKENS:
                continue
            batch = batches.setdefault(shard.dtype, [])
            batch.append(rows)
            if sum(map(_num_tokens, batch)) >= COMPACT_TOKENS:
                yield [row for rows in batches.pop(shard.dtype) for row in rows]
        for batch in batches.values():
            # One whole shard alone is as compact as can be
            if len(batch) > 1 or _num_tokens(batch[0]) < Shard(self.shards / batch[0][0]["name"]).num_tokens:
                yield [row for rows in batch for row in rows]

    def _rewrite(self, rows: list[sqlite3.Row]) -> None:
        """Moves entries to a new shard, as they are stored."""
        packed, records, start = [], [], 0
        for row in rows:
            shard = Shard(self.shards / row["name"])
            num_tokens = _num_tokens([row])
            packed.append(shard.tensors(row["first_token"], num_tokens, row["sha256"]))
            entry = self._entry(row)
            content = Content(
                entry.content_hash, entry.sampling, next(iter(entry.sources), ""), entry.size, 0, entry.metadata
            )
            records.append(Record(content, entry.num_voco_tokens, entry.num_images, start, row["sha256"], entry.added))
            start += num_tokens
        path = save_shard(self.shards, packed, records, shard.fingerprint, shard.dtype)
        self._db.executemany("DELETE FROM entries WHERE id = ?", [(row["id"],) for row in rows])
        self._insert_shard(path.name, records)

    def _rows(
        self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None
    ) -> list[sqlite3.Row]:
        where, values = "content_hash = ?", [content_hash]  # type: tuple[str, list[Any]]
        for name, value in (("num_voco_tokens", num_voco_tokens), ("sampling", sampling)):
            if value is not None:
                where, values = f"{where} AND {name} = ?", [*values, value]
        return self._select(where, values)

    def _select(self, where: str, values: Sequence = ()) -> list[sqlite3.Row]:
        cursor = self._db.cursor()
        cursor.row_factory = sqlite3.Row
        sources = "SELECT json_group_array(source) FROM sources WHERE sources.content_hash = entries.content_hash"
        joined = f"SELECT entries.*, shards.name, ({sources}) AS sources FROM entries JOIN shards ON shards.id = shard"
        return cursor.execute(f"{joined} WHERE {where} ORDER BY shard, first_token", values).fetchall()

    def _entry(self, row: sqlite3.Row) -> Entry:
        return Entry(
            row["content_hash"],
            row["num_voco_tokens"],
            row["sampling"],
            row["num_images"],
            row["size"],
            json.loads(row["metadata"]),
            row["added"],
            tuple(sorted(json.loads(row["sources"]))),
        )

    def _read(self, row: sqlite3.Row) -> VoCoCache:
        """An entry, also if another process has compacted the store since the index was read."""
        while True:
            try:
                shard = Shard(self.shards / row["name"])
                return shard.read(row["first_token"], row["num_images"], row["num_voco_tokens"], row["sha256"])
            except FileNotFoundError as error:
                rows = self._rows(row["content_hash"], row["num_voco_tokens"], row["sampling"])
                if not rows:
                    raise KeyError(f"{row['content_hash']} is not in the store {self.path} any more") from error
                # The index is written before a file goes, so an entry that has not moved is lost
                if rows[0]["name"] == row["name"]:
                    raise ValueError(f"the store {self.path} is damaged: {error}") from error
                row = rows[0]


def _num_tokens(rows: Sequence[sqlite3.Row]) -> int:
    return sum(row["num_images"] * row["num_voco_tokens"] for row in rows)


__all__ = ["Entry", "VoCoStore"]
