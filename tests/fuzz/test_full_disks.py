"""A disk that is full at each write, and folders that cannot be written: said as it is, and nothing is lost."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fuzz.small_store import (
    FINGERPRINT,
    NEW,
    check_content,
    check_whole,
    make_cache,
    make_content,
    make_store,
    originals,
    same,
)
from modeling.helpers import build_processor, tiny_model
from PIL import Image

from voco_llama_hf import VoCoCache
from voco_llama_hf.store import NotWritableError, VoCoStore
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files


FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO)  # SQLite tells no more of a limit than that writing failed
CHANGES: dict[str, Callable[[VoCoStore], object]] = {
    "open": len,
    "add": lambda store: store.add([make_content(NEW)], [originals()[NEW]]),
    "remove": lambda store: store.remove(make_content(4).content_hash),
    "compact": lambda store: store.compact(),
}


def mount(*args: str) -> bool:
    return os.geteuid() == 0 and subprocess.run(["mount", *args], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)):
        pytest.skip("cannot mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Leaves so many bytes on the disk."""
    ballast = folder / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(os.statvfs(folder).f_bavail * 4096 - left, 1))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def limited(folder: Path, left: int) -> Iterator[None]:
    """Files end after so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def change_with_little_room(folder: Path, room: Callable, name: str, sizes: range) -> list[int]:
    """Errors by the room there was; 0 where it was enough."""
    whole, path, numbers = make_store(folder / "whole"), folder / "store", []
    for size in sizes:
        shutil.copytree(whole, path)
        number = 0
        try:
            with room(folder, size), VoCoStore(path, FINGERPRINT) as store:
                CHANGES[name](store)
        except OSError as error:
            assert not isinstance(error, NotWritableError)
            number = error.errno
        numbers.append(number)
        if name == "open" or number:
            with VoCoStore(path) as store:  # nothing is lost
                assert {entry.content_hash for entry in store} >= {f"{seed:064x}" for seed in (0, 1, 2, 3, 5)}
                assert check_content(store) > 10
        with VoCoStore(path, FINGERPRINT) as store:
            CHANGES[name](store)
            store.record([])
        seeds = set(range(6)) | {NEW} if name == "add" else set(range(6)) - {4} if name == "remove" else set(range(6))
        check_whole(path, seeds)
        shutil.rmtree(path)
    return numbers


@pytest.mark.parametrize("name", CHANGES)
def test_a_full_disk(name, small_disk):
    numbers = change_with_little_room(small_disk, filled, name, range(0, 80_000, 8_192))
    assert set(numbers) <= {0, errno.ENOSPC}, numbers
    assert numbers[-1] == 0 and (name == "open") == (numbers[0] == 0)


@pytest.mark.skipif(os.name == "nt", reason="limits")
@pytest.mark.parametrize("name", CHANGES)
def test_files_that_may_not_grow(name, tmp_path):
    numbers = change_with_little_room(tmp_path, limited, name, range(0, 60_000, 6_000))
    assert set(numbers) <= {0, *FULL}, numbers
    assert numbers[-1] == 0 and (name == "open") == (numbers[0] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_full_disk_at_every_block(name, small_disk):
    numbers = change_with_little_room(small_disk, filled, name, range(0, 100_000, 4_096))
    numbers += change_with_little_room(small_disk / "..", limited, name, range(0, 60_000, 512))
    print(f"{name}: {len(numbers)} sizes, {sum(number > 0 for number in numbers)} errors")
    assert set(numbers) <= {0, *FULL}


def test_index_and_save_on_a_full_disk(small_disk, tmp_path):
    processor = build_processor()
    model = tiny_model(voco_token_id=processor.image_token_id).eval()
    (tmp_path / "photos").mkdir()
    for seed in range(4):
        Image.new("RGB", (32, 32), (40 * seed, 9, 9)).save(tmp_path / "photos" / f"{seed}.png")
    files = find_files(tmp_path / "photos")

    def index() -> None:
        indexer = Indexer(small_disk / "s", model, processor, 2, Sampling(num_frames=2), batch_size=1, shard_images=1)
        try:
            list(indexer.run(indexer.select(files)))
        finally:
            indexer.store.close()

    full = 0
    for left in range(0, 240_000, 32_768):
        try:
            with filled(small_disk, left):
                index()
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
            full += 1
        index()
        with VoCoStore(small_disk / "s", model.fingerprint()) as store:
            assert len(store) == 4 and all(problem is None for _, problem in store.verify())
            known = store._index.shard_names()
        assert {file.name for file in (small_disk / "s" / "shards").iterdir()} == known
        shutil.rmtree(small_disk / "s")
    assert full > 1
    path = small_disk / "cache.safetensors"
    make_cache(1).save(path)
    for left in (0, 4_096):
        with filled(small_disk, left), pytest.raises(OSError, match="No space left") as raised:
            make_cache(2, num_images=3_000).save(path)
        assert raised.value.errno == errno.ENOSPC
        assert same(VoCoCache.load(path), make_cache(1)) and os.listdir(small_disk) == ["cache.safetensors"]


def check_readable(path: Path) -> None:
    with VoCoStore(path, FINGERPRINT) as store:
        assert len(store) == 6 and check_content(store) > 10
        assert all(problem is None for _, problem in store.verify())
        with pytest.raises(NotWritableError, match="can be read, but not written"):
            store.add([make_content(NEW)], [originals()[NEW]])
        with pytest.raises(OSError, match="can be read, but not written"):
            store.remove(make_content(0).content_hash)
        assert len(store) == 6


@pytest.mark.parametrize("journal", ["delete", "wal", "killed", "killed wal"])
def test_a_read_only_disk(tmp_path, journal):
    """A store is read from a read-only mount, also one whose last writer was killed, of this version or the first."""
    path = make_store(tmp_path / "store")
    if "wal" in journal or "killed" in journal:
        script = "import os, sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        script += f"db.execute('PRAGMA journal_mode={'wal' if 'wal' in journal else 'delete'}')\n"
        if "killed" in journal:
            # Half of a transaction is in the file, and a journal to undo it, or all of it in the log beside it
            script += "db.execute('PRAGMA cache_size=1')\ndb.execute('BEGIN')\n"
            script += "db.execute('UPDATE sources SET size = 77')\n"
            change = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) "
            script += f"db.execute({change!r} 'INSERT INTO about SELECT hex(randomblob(200)), i FROM n')\n"
            script += "os.kill(os.getpid(), 9)\n"
        else:
            script += "db.close()\n"
        subprocess.run([shutil.which("python3"), "-c", script, str(path / "index.sqlite")], check=False)
        assert ("killed" in journal) == (len(list(path.glob("index.sqlite-*"))) > 0)
    if mount("--bind", str(path), str(path)) and mount("-o", "remount,ro,bind", str(path)):
        try:
            check_readable(path)
        finally:
            subprocess.run(["umount", "-l", str(path)], check=True)
    elif os.geteuid() == 0:
        pytest.skip("cannot mount")
    else:
        path.chmod(0o500)
        check_readable(path)
        path.chmod(0o700)
    check_whole(path, set(range(6)))


def test_a_disk_that_fails(tmp_path, monkeypatch):
    """An I/O error is no damage: it is said, and `verify` goes on."""
    from voco_llama_hf.store import tensor_file

    path = make_store(tmp_path / "store")

    def fail(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with VoCoStore(path, FINGERPRINT) as store:
        monkeypatch.setattr(tensor_file.TensorFile, "rows", fail)
        with pytest.raises(OSError, match="Input/output error"):
            store.get(make_content(0).content_hash)
        assert [type(problem) for _, problem in store.verify()] == [OSError] * 6
        monkeypatch.undo()
        assert check_content(store) > 10
