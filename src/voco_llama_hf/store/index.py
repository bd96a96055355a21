"""The SQLite index of a store: which entry is in which shard, and which files have which content."""

import hashlib
import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .content import Content
from .errors import DamagedError, NotWritableError, readable_errors
from .places import SIDE_FILES
from .shards import Record


VERSION = "2"
UNMARKED_VERSION = "1"  # without the marks of its rows
WAIT = 60  # seconds for another writer
MAX_TEXT = 64_000_000  # bytes of a row
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")  # at the end of a journal that names another file

TABLES = """
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
    sha256 TEXT NOT NULL{mark},
    UNIQUE (content_hash, num_voco_tokens, sampling)
);
CREATE INDEX entries_of_shard ON entries (shard);
CREATE TABLE sources (
    source TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, content_hash TEXT, error TEXT{mark}
);
CREATE INDEX sources_of_content ON sources (content_hash);
"""
SCHEMA = TABLES.replace("{mark}", ", mark TEXT NOT NULL")
UNMARKED_SCHEMA = TABLES.replace("{mark}", "")
# What the mark of a row is made of
ENTRY = (
    "content_hash",
    "num_voco_tokens",
    "sampling",
    "num_images",
    "size",
    "metadata",
    "added",
    "shard",
    "first_token",
    "sha256",
)
SOURCE = ("source", "size", "mtime_ns", "content_hash", "error")


@dataclass(frozen=True)
class Row:
    """An entry as the index has it."""

    id: int
    content_hash: str
    num_voco_tokens: int
    sampling: str
    num_images: int
    size: int
    metadata: dict[str, Any]
    added: str
    shard: str
    first_token: int
    sha256: str

    @property
    def num_tokens(self) -> int:
        return self.num_voco_tokens * self.num_images


@dataclass(frozen=True)
class DamagedRow:
    """A row that is not what was written."""

    content_hash: str
    num_voco_tokens: int
    sampling: str
    problem: DamagedError


class Index:
    """
    The index of a store. Every row carries a mark, the checksum of the others of its columns, so that what a failing
    disk made of it is never taken for the truth.

    It is journaled by a rollback journal: readers need no more than the file, on a read-only disk too.

    Args:
        path (`Path`):
            The database.
        new (`dict[str, str]`, *optional*):
            What a new index is to say about itself.
        obstacle (`str`, *optional*):
            Why the store cannot be written although its index, a copy, can.

    Raises:
        DamagedError: if it is damaged, or is not an index of a store.
        ValueError: if it is empty and not `new`, or of another version.
        OSError: if it cannot be read or made.
    """

    def __init__(self, path: Path, new: dict[str, str] | None = None, obstacle: str | None = None):
        self.path = path
        self.obstacle = self._find_obstacle()
        check_files(path)
        with readable_errors(path):
            self._db = self._open_to_read() if self.obstacle else self._connect("mode=rwc")
            try:
                self._prepare(new)
            except BaseException:
                self._db.close()
                raise
        self.obstacle = self.obstacle or obstacle

    def close(self) -> None:
        self._db.close()

    # Opening

    def _find_obstacle(self) -> str | None:
        """Why the index cannot be written, if it cannot."""
        if self.path.exists() and not (os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK)):
            return "no permission to write, or a read-only disk"
        return None

    def _connect(self, mode: str, path: Path | None = None) -> sqlite3.Connection:
        location = f"{(path or self.path).absolute().as_uri()}?{mode}"
        return self._harden(sqlite3.connect(location, uri=True, timeout=WAIT, isolation_level=None))

    @staticmethod
    def _harden(db: sqlite3.Connection) -> sqlite3.Connection:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_TEXT)
        # File names are bytes, and not always UTF-8
        db.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
        db.row_factory = sqlite3.Row
        db.execute("PRAGMA trusted_schema=OFF")
        db.execute("PRAGMA cell_size_check=ON")
        return db

    def _open_to_read(self) -> sqlite3.Connection:
        """Where nothing can be written: with locks if they can be had, and at last a copy, if a writer was killed."""
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            if "immutable" in mode and any(file.stat().st_size for file in self._side_files()):
                break
            db = self._connect(mode)
            try:
                db.execute("SELECT count(*) FROM sqlite_master")
                return db
            except sqlite3.OperationalError:
                db.close()
        with TemporaryDirectory() as folder:
            for file in (self.path, *self._side_files()):
                shutil.copyfile(file, Path(folder, file.name))
            db = self._connect("mode=rw", Path(folder, self.path.name))
            return self._into_memory(db)

    def _side_files(self) -> list[Path]:
        files = (self.path.with_name(self.path.name + ending) for ending in SIDE_FILES)
        return [file for file in files if file.exists()]

    def _into_memory(self, db: sqlite3.Connection) -> sqlite3.Connection:
        memory = self._harden(sqlite3.connect(":memory:", isolation_level=None))
        db.backup(memory)
        db.close()
        return memory

    def _prepare(self, new: dict[str, str] | None) -> None:
        if not self.obstacle:
            with suppress(sqlite3.OperationalError):  # a reader of an older version, or a full disk
                self._db.execute("PRAGMA journal_mode=DELETE")
        if self._is_empty():
            if new is None:
                raise ValueError(f"{self.path} is empty")
            with self.transaction():
                if self._is_empty():
                    self._create(new)
        version = self._check_schema()
        if version == UNMARKED_VERSION:
            self._upgrade()
        about = self._db.execute("SELECT name, value FROM about WHERE name != 'version'")
        self.about: dict[str, str] = {str(name): str(value) for name, value in about}

    def _is_empty(self) -> bool:
        return self._db.execute("PRAGMA schema_version").fetchone()[0] == 0

    def _create(self, about: dict[str, str]) -> None:
        _make_tables(self._db, SCHEMA)
        self._db.executemany("INSERT INTO about VALUES (?, ?)", {"version": VERSION, **about}.items())

    def _check_schema(self) -> str:
        """Its version. Triggers, views and the like, which could do anything, are none of ours."""
        found = {tuple(row) for row in self._db.execute("SELECT type, name, sql FROM sqlite_master")}
        for version, schema in ((VERSION, SCHEMA), (UNMARKED_VERSION, UNMARKED_SCHEMA)):
            model = sqlite3.connect(":memory:", isolation_level=None)
            _make_tables(model, schema)
            if found == set(model.execute("SELECT type, name, sql FROM sqlite_master")):
                said = self._db.execute("SELECT value FROM about WHERE name = 'version'").fetchone()
                if said is not None and said[0] == version:
                    return version
        if ("table", "about") in {row[:2] for row in found}:
            said = self._db.execute("SELECT value FROM about WHERE name = 'version'").fetchone()
            if said is not None and str(said[0]).isdecimal() and str(said[0]) not in (VERSION, UNMARKED_VERSION):
                raise ValueError(f"{self.path} has VoCoStore version {said[0]}, this package reads {VERSION}")
        raise DamagedError(f"{self.path} is damaged: it does not have the tables of an index")

    def _upgrade(self) -> None:
        """Marks for an index of the first version: in its place, or where it cannot be written in memory."""
        if not self.obstacle:
            try:
                with self.transaction():
                    if self._check_schema() == UNMARKED_VERSION:
                        self._mark_rows()
                return
            except (OSError, sqlite3.Error) as error:
                self.obstacle = f"it is to be upgraded first ({error})"
        self._db = self._into_memory(self._db)
        with _transaction(self._db):
            self._mark_rows()

    def _mark_rows(self) -> None:
        entries = self._db.execute("SELECT * FROM entries").fetchall()
        sources = self._db.execute("SELECT * FROM sources").fetchall()
        self._db.execute("DROP TABLE entries")
        self._db.execute("DROP TABLE sources")
        for statement in _statements(SCHEMA):
            if " entries" in statement or " sources" in statement:
                self._db.execute(statement)
        values = "?, " * len(ENTRY)
        self._db.executemany(
            f"INSERT INTO entries VALUES (?, {values}?)", ((row["id"], *_marked(row, ENTRY)) for row in entries)
        )
        self._insert_sources([tuple(row[name] for name in SOURCE) for row in sources], "")
        self._db.execute("UPDATE about SET value = ? WHERE name = 'version'", (VERSION,))

    # Statements

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """
        All or nothing, while nobody else writes.

        Raises:
            NotWritableError: if the store can be read only.
            TimeoutError: if another process writes and does not come to an end.
            OSError: if the disk is full or fails.
        """
        if self.obstacle:
            raise NotWritableError(13, f"the store can be read, but not written: {self.obstacle}", str(self.path))
        with readable_errors(self.path), _transaction(self._db):
            yield

    def _fetch(self, statement: str, values: Sequence = ()) -> list[sqlite3.Row]:
        with readable_errors(self.path):
            return self._db.execute(statement, values).fetchall()

    def _run(self, statement: str, rows: Iterable[Sequence]) -> None:
        with readable_errors(self.path):
            self._db.executemany(statement, rows)

    def check(self) -> None:
        """
        Reads all of it.

        Raises:
            DamagedError: if anything is wrong with its pages.
        """
        problem = self._fetch("PRAGMA integrity_check(1)")[0][0]
        if problem != "ok":
            with readable_errors(self.path):
                raise sqlite3.DatabaseError(problem)

    # Shards

    def shard_names(self) -> set[str]:
        return {row["name"] for row in self._fetch("SELECT name FROM shards")}

    def insert_shard(self, name: str, records: Iterable[Record]) -> None:
        """A shard, with what it has of entries that are not there yet."""
        with readable_errors(self.path):
            shard = self._db.execute("INSERT INTO shards (name) VALUES (?)", (name,)).lastrowid
        rows = [
            {
                "content_hash": record.content.content_hash,
                "num_voco_tokens": record.num_voco_tokens,
                "sampling": record.content.sampling,
                "num_images": record.num_images,
                "size": record.content.size,
                "metadata": json.dumps(record.content.metadata),
                "added": record.added,
                "shard": shard,
                "first_token": record.first_token,
                "sha256": record.sha256,
            }
            for record in records
        ]
        marks = ", ".join("?" * (len(ENTRY) + 1))
        self._run(
            f"INSERT OR IGNORE INTO entries ({', '.join(ENTRY)}, mark) VALUES ({marks})",
            (_marked(row, ENTRY) for row in rows),
        )

    def drop_empty_shards(self) -> None:
        """A dropped shard stays in the index until its file is gone, so that nobody takes it in again."""
        self._run("UPDATE shards SET dropped = 1 WHERE dropped = 0 AND id NOT IN (SELECT shard FROM entries)", [()])

    def dropped(self) -> list[tuple[int, object]]:
        return [(row["id"], row["name"]) for row in self._fetch("SELECT id, name FROM shards WHERE dropped")]

    def forget_shards(self, ids: Iterable[int]) -> None:
        self._run("DELETE FROM shards WHERE id = ?", ((number,) for number in ids))

    # Entries

    def __len__(self) -> int:
        return self._fetch("SELECT count(*) FROM entries")[0][0]

    def rows(
        self, content_hash: str | None = None, num_voco_tokens: int | None = None, sampling: str | None = None
    ) -> Iterator[Row | DamagedRow]:
        """Entries in the order of the shards; all of them, or those named."""
        named = _named(content_hash, num_voco_tokens, sampling)
        joined = "SELECT entries.*, shards.name AS file FROM entries LEFT JOIN shards ON shards.id = shard"
        found = self._fetch(f"{joined} WHERE {_where(named)} ORDER BY shard, first_token", list(named.values()))
        # An index of SQLite that is damaged leads to other rows
        return (self._row(row) for row in found if all(row[name] == value for name, value in named.items()))

    def _row(self, found: sqlite3.Row) -> Row | DamagedRow:
        try:
            _check_mark(found, ENTRY)
            counts = found["num_voco_tokens"], found["num_images"], found["size"] + 1, found["first_token"] + 1
            metadata = json.loads(found["metadata"])
            names = ("content_hash", "sampling", "added", "file", "sha256")
            if (
                not all(type(count) is int and count > 0 for count in counts)
                or not all(type(found[name]) is str for name in names)
                or not isinstance(metadata, dict)
            ):
                raise ValueError("a column is of another type")
        except (ValueError, TypeError, RecursionError) as error:
            problem = DamagedError(f"a row of {self.path} is damaged: {error}")
            count = found["num_voco_tokens"]
            return DamagedRow(
                str(found["content_hash"]), count if type(count) is int else 0, str(found["sampling"]), problem
            )
        values = {name: found[name] for name in ("id", *ENTRY)} | {"metadata": metadata, "shard": found["file"]}
        return Row(**values)

    def delete(self, content_hash: str, num_voco_tokens: int | None = None, sampling: str | None = None) -> int:
        """Entries, damaged ones too; returns how many."""
        named = _named(content_hash, num_voco_tokens, sampling)
        with readable_errors(self.path):
            return self._db.execute(f"DELETE FROM entries WHERE {_where(named)}", list(named.values())).rowcount

    def delete_rows(self, rows: Iterable[Row]) -> None:
        self._run("DELETE FROM entries WHERE id = ?", ((row.id,) for row in rows))

    # Sources

    def record(self, contents: Iterable[Content], unless_newer: bool = False) -> None:
        """Where contents come from; `unless_newer` keeps what is known of later ones."""
        rows = [(c.source, c.size, c.mtime_ns, c.content_hash, None) for c in contents if c.source]
        self._insert_sources(rows, " WHERE excluded.mtime_ns > mtime_ns" if unless_newer else "")

    def record_failures(self, failures: dict[str, str]) -> None:
        self._insert_sources([(source, 0, 0, None, error) for source, error in failures.items()], "")

    def _insert_sources(self, rows: Iterable[Sequence], condition: str) -> None:
        names = (*SOURCE, "mark")
        replace = f"UPDATE SET ({', '.join(names[1:])}) = ({', '.join(f'excluded.{name}' for name in names[1:])})"
        self._run(
            "INSERT INTO sources VALUES (CAST(? AS TEXT), ?, ?, ?, CAST(? AS TEXT), ?) "
            f"ON CONFLICT (source) DO {replace}{condition}",
            ((_bytes(row[0]), *row[1:4], _bytes(row[4]), _mark(row)) for row in rows),
        )

    def forget_sources(self, content_hash: str) -> None:
        self._run("DELETE FROM sources WHERE content_hash = ?", [(content_hash,)])

    def sources(self, where: str, values: Sequence = ()) -> list[sqlite3.Row]:
        """Rows of sources that are what was written."""
        found = self._fetch(f"SELECT * FROM sources WHERE {where} ORDER BY source", values)
        return [row for row in found if _is_source(row)]

    def sources_of(self, content_hash: str) -> tuple[str, ...]:
        found = self.sources("content_hash = ?", (content_hash,))
        return tuple(row["source"] for row in found if row["content_hash"] == content_hash)

    def source(self, name: str) -> sqlite3.Row | None:
        found = self.sources("source = CAST(? AS TEXT)", (_bytes(name),))
        return next((row for row in found if row["source"] == name), None)

    def sources_ending(self, name: str) -> list[sqlite3.Row]:
        """Those whose last parts of the path are these."""
        ending = _bytes(os.sep + name)
        found = self.sources("substr(source, -length(CAST(?1 AS TEXT))) = CAST(?1 AS TEXT)", (ending,))
        return [row for row in found if row["source"].endswith(os.sep + name)]

    def hashes_starting(self, digits: str) -> list[str]:
        found = self._fetch(
            "SELECT DISTINCT content_hash FROM entries WHERE substr(content_hash, 1, length(?1)) = ?1", (digits,)
        )
        return [row["content_hash"] for row in found if type(row["content_hash"]) is str]

    def failures(self) -> dict[str, str]:
        return {row["source"]: row["error"] for row in self.sources("error IS NOT NULL")}


def check_files(index: Path) -> None:
    """
    SQLite follows links, waits for pipes, and deletes what a journal names: nothing of that in a folder of others.

    Raises:
        DamagedError: if the index or a file beside it is no file, or a journal names another one.
    """
    for ending in ("", *SIDE_FILES):
        file = index.with_name(index.name + ending)
        try:
            found = file.lstat()
        except FileNotFoundError:
            continue
        if not stat.S_ISREG(found.st_mode):
            raise DamagedError(f"{file} is a link, a folder or a device, not a file")
        if ending == "-journal" and found.st_size >= len(JOURNAL_MAGIC):
            with file.open("rb") as journal:
                journal.seek(-len(JOURNAL_MAGIC), os.SEEK_END)
                if journal.read() == JOURNAL_MAGIC:
                    raise DamagedError(f"{file} names another file, which no journal of a store does")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back itself after some errors
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _statements(schema: str) -> list[str]:
    return [statement for statement in schema.split(";") if statement.strip()]


def _make_tables(db: sqlite3.Connection, schema: str) -> None:
    for statement in _statements(schema):
        db.execute(statement)


def _named(content_hash: str | None, num_voco_tokens: int | None, sampling: str | None) -> dict[str, Any]:
    named = {"content_hash": content_hash, "num_voco_tokens": num_voco_tokens, "sampling": sampling}
    return {name: value for name, value in named.items() if value is not None}


def _where(named: dict[str, Any]) -> str:
    return " AND ".join(f"{name} = ?" for name in named) or "1"


def _bytes(text: str | None) -> bytes | None:
    """For `CAST(? AS TEXT)`, which takes names of files as they are."""
    return None if text is None else text.encode("utf-8", "surrogateescape")


def _mark(values: Sequence) -> str:
    """Checksum of the columns of a row, their types among it."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _marked(row: sqlite3.Row | dict[str, str | int | None], names: Sequence[str]) -> tuple:
    values = [row[name] for name in names]
    return (*values, _mark(values))


def _is_source(row: sqlite3.Row) -> bool:
    try:
        _check_mark(row, SOURCE)
    except (ValueError, TypeError):
        return False
    texts = row["source"], row["content_hash"] or "", row["error"] or ""
    return all(type(text) is str for text in texts)


def _check_mark(row: sqlite3.Row, names: Sequence[str]) -> None:
    if row["mark"] != _mark([row[name] for name in names]):
        raise ValueError("it does not match its checksum")


__all__ = ["DamagedRow", "Index", "Row", "check_files"]
