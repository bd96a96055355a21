"""Stores that are read through fsspec: from memory, and from a server that speaks S3."""

import shutil
import sqlite3

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from store.test_store import FINGERPRINT, cache, content, same

from voco_llama_hf.store import DamagedError, NotWritableError, VoCoStore


class CountingFileSystem(MemoryFileSystem):
    """Counts what is read of shards."""

    protocol = "counting"
    cachable = False
    num_bytes = 0

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://"))

    def cat_ranges(self, paths, starts, ends, **options):
        found = super().cat_ranges(paths, starts, ends, **options)
        type(self).num_bytes += sum(map(len, found))
        return found


fsspec.register_implementation("counting", CountingFileSystem, clobber=True)


@pytest.fixture
def local(tmp_path):
    """Images 0 to 59 in two shards, and a video."""
    with VoCoStore(tmp_path / "store", FINGERPRINT) as store:
        store.add([content(i) for i in range(30)], [cache(i) for i in range(30)])
        film = content(60, sampling="num_frames=4")
        store.add([*map(content, range(30, 60)), film], [*map(cache, range(30, 60)), cache(60, num_images=4)])
        store.record_failures({"/photos/broken.png": "is damaged"})
    return tmp_path / "store"


@pytest.fixture(params=["memory", "counting", "file", "zip", "s3"])
def url(request, local, tmp_path):
    """Where the same store lies elsewhere."""
    if request.param == "file":
        yield f"file://{local}"
    elif request.param == "zip":
        shutil.make_archive(f"{tmp_path}/store", "zip", local.parent, local.name)
        yield f"zip://store::file://{tmp_path}/store.zip"
    elif request.param == "s3":
        yield request.getfixturevalue("s3_url")
    else:
        files = fsspec.filesystem(request.param)
        files.put(f"{local}/", "/photos.voco/", recursive=True)
        yield f"{request.param}://photos.voco"
        files.rm("/photos.voco", recursive=True)


@pytest.fixture
def s3(s3_server):
    """What s3fs needs to talk to the server."""
    pytest.importorskip("s3fs")
    if s3_server is None:
        pytest.skip("needs moto[server]")
    return {"key": "a", "secret": "b", "endpoint_url": s3_server}


@pytest.fixture
def s3_url(s3, local, monkeypatch):
    for name, value in {
        "AWS_ACCESS_KEY_ID": s3["key"],
        "AWS_SECRET_ACCESS_KEY": s3["secret"],
        "AWS_ENDPOINT_URL": s3["endpoint_url"],
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", **s3)
    files.mkdir("bucket")
    files.put(f"{local}/", "bucket/photos.voco/", recursive=True)
    yield "s3://bucket/photos.voco"
    files.rm("bucket", recursive=True)


def test_reads_what_the_folder_has(url, local):
    with VoCoStore(url, FINGERPRINT) as remote, VoCoStore(local) as store:
        assert list(remote) == list(store) and len(remote) == 61
        assert (remote.nbytes, remote.failures(), remote.eight_bit) == (store.nbytes, store.failures(), False)
        for entry in remote:
            assert same(remote.get(entry.content_hash), store.get(entry.content_hash))
        assert [entry.content_hash for entry in remote.find("7.png")] == [content(7).content_hash]
        assert all(problem is None for _, problem in remote.verify())
        with pytest.raises(KeyError):
            remote.get(content(99).content_hash)
        assert url in repr(remote)


def test_is_not_written(url, local):
    before = {path: path.read_bytes() for path in local.rglob("*") if path.is_file()}
    with VoCoStore(url) as remote:
        for write in (
            lambda: remote.add([content(99)], [cache(99)]),
            lambda: remote.remove(content(1).content_hash),
            remote.compact,
            lambda: remote.record_failures({"a": "b"}),
        ):
            with pytest.raises(NotWritableError, match=r"can be read, but not written: .* is not a folder"):
                write()
        assert len(remote) == 61
    assert {path: path.read_bytes() for path in local.rglob("*") if path.is_file()} == before


def test_many_readers(url):
    """Each with an index of its own, which is gone when it is closed."""
    readers = [VoCoStore(url) for _ in range(3)]
    copies = [reader._index.path for reader in readers]
    assert len(set(copies)) == 3 and all(copy.exists() for copy in copies)
    for seed in (3, 40, 3):
        assert all(same(reader.get(content(seed).content_hash), cache(seed)) for reader in readers)
    for reader in readers:
        reader.close()
    assert not any(copy.parent.exists() for copy in copies)


@pytest.mark.parametrize("url", ["counting"], indirect=True)
def test_shards_are_read_by_range(url):
    with VoCoStore(url) as remote:
        remote.get(content(3).content_hash)
        CountingFileSystem.num_bytes = 0
        stored = remote.get(content(4).content_hash)
        assert CountingFileSystem.num_bytes == stored.nbytes


@pytest.mark.parametrize("url", ["memory", "s3"], indirect=True)
def test_what_is_wrong_is_said(url):
    files, root = fsspec.core.url_to_fs(url)
    with pytest.raises(FileNotFoundError, match=r"no VoCoStore at .*/missing"):
        VoCoStore(f"{url}/missing", FINGERPRINT)
    with pytest.raises(ValueError, match="layers is 2, not 3"):
        VoCoStore(url, {**FINGERPRINT, "layers": "3"})
    with VoCoStore(url) as remote:
        first = sorted(remote._place.names())[0]
        path = f"{root}/shards/{first}"
        whole = files.cat_file(path)
        files.pipe_file(path, whole[:-1] + bytes([whole[-1] ^ 1]))
        assert [type(problem) for _, problem in remote.verify() if problem] == [DamagedError]
        files.rm(path)
        remote._close_shards([first])
        assert sum("is missing, or it has changed" in str(problem) for _, problem in remote.verify()) in (30, 31)


def test_a_server_that_is_not_there(s3):
    with pytest.raises(OSError, match=r"s3://bucket/photos\.voco cannot be read"):
        options = {**s3, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 1}}}
        VoCoStore("s3://bucket/photos.voco", storage_options=options)
    with pytest.raises(FileNotFoundError):
        VoCoStore("s3://nobucket/photos.voco", storage_options=s3)
    with pytest.raises(ValueError, match="Protocol not known"):
        VoCoStore("nothing://bucket")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/b.safetensors", "..", "s3://other/a"])
def test_names_in_an_index_lead_nowhere(local, name):
    with sqlite3.connect(local / "index.sqlite") as index:
        index.execute("UPDATE shards SET name = ? WHERE id = 1", (name,))
    with VoCoStore(f"file://{local}") as remote:
        with pytest.raises(DamagedError, match="is not the name of a file in"):
            remote.get(content(3).content_hash)
        assert torch.equal(remote.get(content(40).content_hash).keys, cache(40).keys)


def test_an_index_in_the_middle_of_a_transaction(local):
    """A copy that was taken while somebody wrote: its journal undoes what is half done."""
    files = fsspec.filesystem("memory")
    writer = sqlite3.connect(local / "index.sqlite", isolation_level=None)
    writer.execute("PRAGMA cache_size=1")
    writer.execute("BEGIN")
    writer.execute("UPDATE entries SET size = 77, metadata = hex(randomblob(2000))")
    assert (local / "index.sqlite-journal").stat().st_size > 0
    files.put(f"{local}/", "/torn.voco/", recursive=True)
    writer.execute("ROLLBACK")
    try:
        with VoCoStore("memory://torn.voco") as remote, VoCoStore(local) as store:
            assert list(remote) == list(store)
    finally:
        files.rm("/torn.voco", recursive=True)
