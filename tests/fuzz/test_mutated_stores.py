"""Stores that failing disks and strangers have changed: nothing else is believed, nothing outside is touched."""

import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz.small_store import FINGERPRINT, NEW, check_content, check_whole, make_content, make_store, use, write_index

from voco_llama_hf.store import DamagedError, VoCoStore, indexing
from voco_llama_hf.store.index import ENTRY, JOURNAL_MAGIC, SOURCE, _mark


MAX_MEMORY = 200_000_000
NAMES = (
    "../../thesis.txt",
    "../thesis.txt",
    "{outside}/thesis.txt",
    "..",
    ".",
    "",
    "/",
    "a/b.safetensors",
    "a\\b.safetensors",
    "x\0.safetensors",
    "index.sqlite",
    "../index.sqlite",
    b"\xff\xfe",
)
VALUES = (
    None,
    -1,
    0,
    2**62,
    1.5,
    "",
    "x" * 100_000,
    b"\0\xff",
    "[" * 50_000,
    '{"a": 1e999}',
    "\x1b[31m",
    "999" * 2000,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("whole") / "store")


@contextmanager
def awake(seconds: int = 120):
    """A pipe that is opened waits for ever: the alarm ends it."""

    def wake(*args):
        raise AssertionError(f"nothing happened for {seconds} s")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Attack:
    """One way to break a copy of a store, chosen by a seed."""

    def __init__(self, path: Path, seed: int):
        self.path, self.random = path, random.Random(seed)
        self.outside = path.parent
        self.lies = False  # whether checksums fit what it says
        self.files = [path / "index.sqlite", *sorted((path / "shards").iterdir())]

    def flip(self) -> str:
        file = self.random.choice(self.files)
        content = bytearray(file.read_bytes())
        bit = self.random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        return f"bit {bit} of {file.name}"

    def flip_what_counts(self) -> str:
        """The header of a shard, or a page of the index that is not empty."""
        file = self.random.choice(self.files)
        content = bytearray(file.read_bytes())
        used = [i for i, byte in enumerate(content[:40_000]) if byte]
        place, bit = self.random.choice(used), self.random.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        return f"bit {bit} of byte {place} of {file.name}"

    def cut(self) -> str:
        file = self.random.choice(self.files)
        length = self.random.randrange(file.stat().st_size)
        os.truncate(file, length)
        return f"{file.name} cut to {length}"

    def overwrite(self) -> str:
        file = self.random.choice(self.files)
        content = bytearray(file.read_bytes())
        place = self.random.randrange(len(content))
        content[place : place + self.random.randrange(1, 600)] = self.random.randbytes(self.random.randrange(600))
        file.write_bytes(content)
        return f"{file.name} overwritten at {place}"

    def name_outside(self) -> str:
        name = self.random.choice(NAMES)
        name = name.format(outside=self.outside) if isinstance(name, str) else name
        dropped = self.random.randrange(2)
        if self.random.randrange(2):
            write_index(self.path, ("INSERT OR REPLACE INTO shards (name, dropped) VALUES (?, ?)", (name, dropped)))
        else:
            write_index(self.path, ("UPDATE shards SET name = ? WHERE id = 1", (name,)))
        return f"shard {name!r}, dropped {dropped}"

    def change_a_row(self) -> str:
        """With a mark that fits, as somebody would who knows how."""
        self.lies = True
        table, names = self.random.choice((("entries", ENTRY), ("sources", SOURCE)))
        name, value = self.random.choice(names), self.random.choice(VALUES)
        db = sqlite3.connect(self.path / "index.sqlite")
        row = dict(zip(names, db.execute(f"SELECT {', '.join(names)} FROM {table} LIMIT 1").fetchone()))
        row[name] = value
        try:
            mark = _mark(list(row.values()))
        except TypeError:
            mark = "none"
        try:
            with db:
                db.execute(f"UPDATE {table} SET {name} = ?, mark = ? WHERE rowid = 1", (value, mark))
        except sqlite3.IntegrityError:
            pass
        db.close()
        return f"{table}.{name} = {str(value)[:20]!r}"

    def change_about(self) -> str:
        value = self.random.choice(("", "{}", "null", '{"weights": 1}', "[" * 9_000, "true", "9", b"\xff"))
        name = self.random.choice(("fingerprint", "eight_bit", "version"))
        write_index(self.path, ("UPDATE about SET value = ? WHERE name = ?", (value, name)))
        return f"about.{name} = {value[:20]!r}"

    def change_the_schema(self) -> str:
        statement = self.random.choice(
            (
                "CREATE TRIGGER t AFTER INSERT ON sources BEGIN DELETE FROM entries; END",
                "CREATE VIEW v AS SELECT * FROM entries",
                "DROP TABLE sources",
                "ALTER TABLE entries ADD COLUMN more TEXT",
                "DROP INDEX sources_of_content",
                "PRAGMA user_version = 77",
                "PRAGMA journal_mode = WAL",
            )
        )
        write_index(self.path, (statement, ()))
        return statement

    def change_a_header(self) -> str:
        """Of a shard that the index does not know yet, so that all of it is read."""
        file = self.files[1]
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        part = self.random.choice(("records", "fingerprint", "dtype", "version", "tensor", "entry", "content"))
        value = self.random.choice(
            ("", "[]", "{}", "null", "[" * 5_000, "[[]]", '[{"content": {}}]', "1", "load", 2**70)
        )
        if part == "tensor":
            described = header[self.random.choice(("keys", "values"))]
            described[self.random.choice(("dtype", "shape", "data_offsets"))] = self.random.choice(
                ([0, 2**62], [2**31, 2**31, 4], [1] * 100_000, "I64", None, [-1, 5], {}, [0, 0], "F32")
            )
        elif part in ("entry", "content"):
            header["__metadata__"]["version"], self.lies = "1", True  # has no checksum
            records = json.loads(header["__metadata__"]["records"])
            changed = records[0] if part == "entry" else records[0]["content"]
            changed[self.random.choice([*changed, "more"])] = self.random.choice(
                (None, -1, 2**40, 2**70, True, "x", [], {"a": []}, 1.5)
            )
            header["__metadata__"]["records"] = json.dumps(records)
        else:
            header["__metadata__"][part] = str(value)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        if self.random.randrange(2):
            write_index(self.path, ("DELETE FROM entries", ()), ("DELETE FROM shards", ()))
        return f"{part} of a header: {str(value)[:20]}"

    def put_something_else(self) -> str:
        """A link, a pipe, a folder or a device where a file is expected, or beside."""
        sides = [self.path / f"index.sqlite{ending}" for ending in ("-journal", "-wal", "-shm")]
        more = [self.path / "shards" / name for name in ("a.safetensors", ".shard.abcdefgh.part", f"{'0' * 32}.part")]
        file = self.random.choice([*self.files, *sides, *more, self.path / "shards"])
        kind = self.random.choice(("link", "pipe", "folder", "device", "dangling", "garbage"))
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        if kind == "link":
            file.symlink_to(self.random.choice((self.outside / "thesis.txt", self.outside, "/dev/zero")))
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            file.mkdir()
            (file / "held").write_text("held")
        elif kind == "device" and os.geteuid() == 0:
            os.mknod(file, 0o20666, os.makedev(1, 5))
        elif kind == "garbage":
            file.write_bytes(self.random.randbytes(self.random.randrange(5_000)))
        else:
            file.symlink_to(self.outside / "new.txt")
        return f"{kind} at {file.name}"

    def write_a_journal(self) -> str:
        """One that looks as if a writer had been killed, and names a file that SQLite is to delete."""
        names_a_file = self.random.randrange(2)
        write_journal(self.path, self.outside / "thesis.txt" if names_a_file else None)
        return f"a journal, names a file: {names_a_file}"

    def run(self) -> str:
        ways = [self.flip] * 4 + [self.flip_what_counts] * 4
        ways += [
            self.cut,
            self.overwrite,
            self.name_outside,
            self.change_a_row,
            self.change_about,
            self.change_the_schema,
            self.change_a_header,
            self.put_something_else,
            self.put_something_else,
            self.write_a_journal,
        ]
        return self.random.choice(ways)()


def write_journal(path: Path, named: Path | None) -> None:
    """A rollback journal of no pages, and at its end the name of a file, as transactions over databases have."""
    pages = (path / "index.sqlite").stat().st_size // 4096
    content = (JOURNAL_MAGIC + struct.pack(">IIIII", 0, 1, pages, 512, 4096)).ljust(512, b"\0")
    if named is not None:
        name = os.fsencode(named)
        content += struct.pack(">I", 2**30 // 4096 + 1) + name + struct.pack(">II", len(name), sum(name))
        content += JOURNAL_MAGIC
    (path / "index.sqlite-journal").write_bytes(content)


def attack(whole: Path, folder: Path, seeds: range) -> dict[str, int]:
    """Counts what became of stores, each attacked in one way."""
    counts = {"used": 0, "ValueError": 0, "OSError": 0}
    outside = {"thesis.txt": "years of work", "index.sqlite": "another"}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        place = folder / str(seed)
        place.mkdir()
        for name, text in outside.items():
            (place / name).write_text(text)
        shutil.copytree(whole, place / "store")
        attacked = Attack(place / "store", seed)
        what = attacked.run()
        try:
            with awake():
                use(place / "store", attacked.lies)
            counts["used"] += 1
        except (ValueError, OSError) as error:
            counts["ValueError" if isinstance(error, ValueError) else "OSError"] += 1
            assert str(error), what
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {what}: {error!r}") from error
        found = {file.name: file.read_text() for file in place.iterdir() if file.name != "store"}
        assert found == outside, f"seed {seed}, {what}: {found}"
        shutil.rmtree(place)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MAX_MEMORY
    return counts


def test_mutated_stores(whole, tmp_path):
    counts = attack(whole, tmp_path, range(20))
    assert counts["used"] > 2 and counts["ValueError"] > 2


@pytest.mark.slow
def test_many_mutated_stores(whole, tmp_path):
    print(attack(whole, tmp_path, range(1_000, 3_000)))


@pytest.mark.parametrize("file", ["index.sqlite", "shard"])
def test_flipped_bits_are_noticed(whole, tmp_path, file):
    """Of all bits of the strings that a store consists of, those that a glance shows."""
    chosen = random.Random(0)
    for seed in range(15):
        shutil.copytree(whole, tmp_path / str(seed))
        broken = (
            tmp_path / str(seed) / file if file == "index.sqlite" else min((tmp_path / str(seed)).glob("shards/*"))
        )
        content = bytearray(broken.read_bytes())
        places = [i for i, byte in enumerate(content) if chr(byte).isalnum()]
        content[chosen.choice(places)] ^= 1 << chosen.randrange(8)
        broken.write_bytes(content)
        try:
            with VoCoStore(tmp_path / str(seed)) as store:
                check_content(store)
        except ValueError as error:
            assert "damaged" in str(error) or "another model" in str(error) or "version" in str(error)


@pytest.mark.parametrize("name", ["../../thesis.txt", "{outside}/thesis.txt", "../index.sqlite"])
def test_a_row_that_names_another_file(whole, tmp_path, name):
    """Opening deleted it once."""
    path = tmp_path / "deep" / "store"
    shutil.copytree(whole, path)
    (tmp_path / "deep" / "thesis.txt").write_text("years of work")
    name = name.format(outside=tmp_path / "deep")
    write_index(path, ("INSERT INTO shards (name, dropped) VALUES (?, 1)", (name,)))
    (path / "shards" / "stray.safetensors").write_text("not a shard")
    with VoCoStore(path) as store:
        assert store.left_out.keys() == {"stray.safetensors"}
    with VoCoStore(path, FINGERPRINT) as store:
        store.remove(make_content(0).content_hash)
        store.compact()
        assert len(store) == 5
    assert (tmp_path / "deep" / "thesis.txt").read_text() == "years of work"
    assert (path / "index.sqlite").is_file() and (path / "shards" / "stray.safetensors").is_file()


def test_reading_deletes_nothing(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    write_index(tmp_path / "store", ("UPDATE shards SET dropped = 1", ()), ("DELETE FROM entries", ()))
    before = sorted((tmp_path / "store" / "shards").iterdir())
    with VoCoStore(tmp_path / "store") as store:
        list(store), list(store.verify()), store.find("0.png")
    assert sorted((tmp_path / "store" / "shards").iterdir()) == before


def test_a_journal_that_names_another_file(whole, tmp_path):
    """SQLite itself would delete it, as the end of a transaction over several databases."""
    shutil.copytree(whole, tmp_path / "store")
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("years of work")
    write_journal(tmp_path / "store", thesis)
    with pytest.raises(DamagedError, match="names another file"):
        VoCoStore(tmp_path / "store")
    assert thesis.read_text() == "years of work"
    db = sqlite3.connect(tmp_path / "store" / "index.sqlite")
    db.execute("SELECT count(*) FROM entries").fetchone()
    db.close()
    assert not thesis.exists()  # so much for the threat


def test_damaged_entries_are_made_again(whole, tmp_path):
    """A row, a header and a tensor, each broken: not there any more, or replaced; `add` brings all of them back."""
    from fuzz.small_store import originals

    shutil.copytree(whole, tmp_path / "store")
    write_index(tmp_path / "store", ("UPDATE entries SET first_token = 1 WHERE content_hash = ?", (f"{0:064x}",)))
    shard = max((tmp_path / "store" / "shards").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with VoCoStore(tmp_path / "store", FINGERPRINT) as store:
        assert sorted(int(entry.content_hash, 16) for entry, problem in store.verify() if problem) == [0, 5]
        assert f"{0:064x}" not in store and f"{5:064x}" in store
        for seed in (0, 5):
            with pytest.raises(DamagedError):
                store.get(f"{seed:064x}")
        film = make_content(5, sampling="num_frames=3")
        store.compact()  # leaves what is damaged
        assert store.add([make_content(0)], [originals()[0]]) == 1
        assert store.add([film], [originals()[5]], replace=True) == 1
        store.compact()
    check_whole(tmp_path / "store", set(range(6)))


def test_an_index_of_the_first_version(whole, tmp_path):
    """Without marks, journaled by a write-ahead log: read where it cannot be written, upgraded where it can."""
    from voco_llama_hf.store.index import UNMARKED_SCHEMA

    shutil.copytree(whole, tmp_path / "store")
    file = tmp_path / "store" / "index.sqlite"
    new = sqlite3.connect(file)
    rows = {
        name: new.execute(f"SELECT * FROM {name}").fetchall() for name in ("about", "shards", "entries", "sources")
    }
    new.close()
    file.unlink()
    old = sqlite3.connect(file, isolation_level=None)
    old.execute("PRAGMA journal_mode=WAL")
    for statement in filter(str.strip, UNMARKED_SCHEMA.split(";")):
        old.execute(statement)
    for name, its_rows in rows.items():
        width = len(its_rows[0]) - (name in ("entries", "sources"))
        old.executemany(f"INSERT INTO {name} VALUES ({', '.join('?' * width)})", [row[:width] for row in its_rows])
    old.execute("UPDATE about SET value = '1' WHERE name = 'version'")
    old.close()
    check_whole(tmp_path / "store", set(range(6)))
    with VoCoStore(tmp_path / "store") as store:
        assert store.find("also 1.png")[0].metadata == {"number": 1}
        assert store.failures() == {"/photos/broken.png": "is damaged"}


@pytest.mark.parametrize("kind", ["pipe", "folder", "unreadable"])
def test_odd_things_in_an_indexed_folder(tmp_path, kind):
    """One recorded failure each; a pipe is never opened."""
    odd = tmp_path / "odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
        odd.chmod(0)
        if os.access(odd, os.R_OK):
            pytest.skip("root reads everything")
    else:
        odd.symlink_to(odd)
    assert indexing.find_files(tmp_path) == [str(odd)]
    reader = indexing.FileReader([str(odd)], None, indexing.Sampling(3))
    with awake(20):
        path, content, pixels, error = reader[0]
    assert (path, content, pixels) == (str(odd), None, None) and error
    odd.chmod(0o700) if kind == "folder" else None


def test_names_that_are_no_text(tmp_path):
    path = make_store(tmp_path / "store")
    name = os.fsdecode(b"/photos/caf\xe9.png")
    with VoCoStore(path, FINGERPRINT) as store:
        from voco_llama_hf.store import Content

        store.record([Content(make_content(1).content_hash, source=name, size=7, mtime_ns=8)])
        store.record_failures({os.fsdecode(b"/photos/\xff.png"): os.fsdecode(b"\xff is none")})
        assert name in store.find(name)[0].sources and store.find(os.fsdecode(b"caf\xe9.png"))
        assert store.is_known(name, 2, "", 7, 8)
        assert os.fsdecode(b"/photos/\xff.png") in store.failures()
        (entry,) = [entry for entry in store if name in entry.sources]
        store.compact()
        assert store.find(name) == [entry]
    (path / "index.sqlite").unlink()
    with VoCoStore(path, FINGERPRINT) as store:
        assert len(store) == 6


def test_what_was_added_is_used(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    assert use(tmp_path / "store") > 6
    check_whole(tmp_path / "store", {0, 1, 2, 3, 5, NEW})


def test_every_byte_of_a_name_in_the_index(whole, tmp_path):
    """SQLite has names twice, in a table and in an index beside it: either one broken leads to no other content."""
    content = (whole / "index.sqlite").read_bytes()
    places = [i for i in range(len(content)) if content[i - 8 : i] == b"/photos/"]
    assert len(places) > 14
    shutil.copytree(whole, tmp_path / "store")
    for place in places:
        for other in b"0123459":
            changed = bytearray(content)
            changed[place] = other
            (tmp_path / "store" / "index.sqlite").write_bytes(changed)
            with VoCoStore(tmp_path / "store") as store:
                check_content(store)
