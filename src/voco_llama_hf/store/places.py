"""Where shards lie: a folder of this machine, or one that is read through fsspec, by range and never written."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ..files import inside, open_regular
from .errors import DamagedError


INDEX, SHARDS = "index.sqlite", "shards"
SIDE_FILES = ("-journal", "-wal", "-shm")  # of SQLite
LOCAL_OPEN, REMOTE_OPEN = 8, 128  # shards that stay open for the next entry: handles, and headers in memory
MAX_INDEX = 16_000_000_000  # bytes


class ByteFile(Protocol):
    """A file that is read by range."""

    name: str
    size: int

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """Bytes from each start, as many as its length; fewer where the file ends."""

    def close(self) -> None: ...


class Place(Protocol):
    """Where the shards of a store lie."""

    max_open: int

    def names(self) -> set[str]:
        """Files named like shards."""

    def open(self, name: str) -> ByteFile:
        """A shard by the name that an index, which is believed nothing, has for it."""

    def version(self, name: str) -> tuple[int, ...]:
        """Changes when the file under a name is another one."""

    def nbytes(self) -> int:
        """Bytes of all files."""

    def close(self) -> None: ...


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether fsspec is to read it, as in `s3://bucket/photos.voco`."""
    return isinstance(path, str) and "://" in path


class LocalFile:
    """
    A file of this machine, which stays open.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: if it is a link, a pipe or anything else than a file.
    """

    def __init__(self, path: Path):
        self.name = os.fspath(path)
        try:
            self._file = open_regular(path)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        found = []
        for start, length in spans:
            content = bytearray(length)
            self._file.seek(start)
            found.append(content[: self._file.readinto(content)])  # type: ignore[attr-defined]
        return found

    def close(self) -> None:
        self._file.close()


class LocalPlace:
    """A folder of this machine."""

    max_open = LOCAL_OPEN

    def __init__(self, folder: Path):
        self.folder = folder

    def names(self) -> set[str]:
        return {path.name for path in self.folder.glob("*.safetensors")}

    def open(self, name: str) -> LocalFile:
        return LocalFile(self._path(name))

    def version(self, name: str) -> tuple[int, ...]:
        found = self._path(name).lstat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    def _path(self, name: str) -> Path:
        try:
            return inside(self.folder, name)
        except ValueError as error:
            raise DamagedError(str(error)) from error

    def nbytes(self) -> int:
        files = (Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names)
        return sum(path.lstat().st_size for path in files)

    def close(self) -> None:
        pass


@contextmanager
def remote_errors(what: str) -> Iterator[None]:
    """Errors of the many libraries behind fsspec as OSError, which says what could not be read."""
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{what} cannot be read: {error or type(error).__name__}") from error


class RemoteFile:
    """A file that fsspec reads; nothing of it is kept."""

    def __init__(self, filesystem: Any, path: str, name: str):
        self._filesystem, self._path, self.name = filesystem, path, name
        with remote_errors(name):
            self.size = int(filesystem.info(path)["size"])

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytearray]:
        """All of them at the same time, where the file system can."""
        with remote_errors(self.name):
            starts, ends = zip(*((start, min(start + length, self.size)) for start, length in spans))
            found = self._filesystem.cat_ranges([self._path] * len(spans), list(starts), list(ends), on_error="raise")
            return [bytearray(content) for content in found]

    def close(self) -> None:
        pass


class RemotePlace:
    """
    A folder that fsspec reads.

    Args:
        url (`str`):
            As in `"s3://bucket/photos.voco"` or `"hf://datasets/user/photos/photos.voco"`.
        storage_options (`dict`, *optional*):
            What its file system takes: keys, an endpoint.

    Raises:
        ValueError: if there is no such protocol.
        ImportError: if its package is not installed.
    """

    max_open = REMOTE_OPEN

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None):
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        self.filesystem, self.root = url_to_fs(self.url, **(storage_options or {}))
        self._copies: TemporaryDirectory | None = None

    def fetch_index(self) -> Path:
        """
        A copy of the index on this machine, for as long as this place is open.

        Raises:
            FileNotFoundError: if there is none.
            OSError: if it cannot be read.
        """
        self.filesystem.invalidate_cache()
        self._copies = TemporaryDirectory(prefix="voco-store-")
        index = Path(self._copies.name, INDEX)
        with remote_errors(self.url):
            for ending in ("", *SIDE_FILES):
                path = f"{self.root}/{INDEX}{ending}"
                try:
                    size = self.filesystem.info(path)["size"]
                except (FileNotFoundError, PermissionError) as error:
                    if ending:
                        continue  # who may not list a bucket is forbidden what is not there
                    if isinstance(error, PermissionError):
                        raise
                    raise FileNotFoundError(f"no VoCoStore at {self.url}") from None
                if size > MAX_INDEX:
                    raise OSError(f"the index of {self.url} has {size:,} bytes, at most {MAX_INDEX:,} are read")
                self.filesystem.get_file(path, os.fspath(index) + ending)
        return index

    def names(self) -> set[str]:
        return {name for name in self._sizes() if name.endswith(".safetensors")}

    def open(self, name: str) -> RemoteFile:
        try:
            inside(self.root, name)
        except ValueError as error:
            raise DamagedError(str(error)) from error
        return RemoteFile(self.filesystem, f"{self.root}/{SHARDS}/{name}", f"{self.url}/{SHARDS}/{name}")

    def version(self, name: str) -> tuple[int, ...]:
        """Shards do not change under their names, and asking takes as long as reading."""
        return ()

    def nbytes(self) -> int:
        return sum(self._sizes().values())

    def _sizes(self) -> dict[str, int]:
        with remote_errors(self.url):
            self.filesystem.invalidate_cache()
            try:
                found = self.filesystem.ls(f"{self.root}/{SHARDS}", detail=True)
            except FileNotFoundError:
                return {}
        return {str(file["name"]).rsplit("/", 1)[-1]: int(file["size"]) for file in found if file["type"] == "file"}

    def close(self) -> None:
        if self._copies is not None:
            self._copies.cleanup()


__all__ = ["INDEX", "SHARDS", "SIDE_FILES", "ByteFile", "LocalFile", "LocalPlace", "Place", "RemotePlace", "is_url"]
