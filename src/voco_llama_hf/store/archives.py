"""What an archive consists of, here or behind a URL: images, videos, Parquet files and tars of WebDataset."""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..files import check_inside, check_regular
from ..videos import is_video
from .indexing import find_files, image_suffixes
from .places import is_url, remote_errors


MAX_MEMBER = 16_000_000_000  # bytes of a file in a tar
IMAGE_COLUMNS = ("image", "bytes", "jpg", "jpeg", "png", "webp", "video", "mp4", "img", "content")
NAME_COLUMNS = ("path", "file_name", "filename", "__key__", "id")
ROWS_AT_A_TIME = 64


@dataclass(frozen=True)
class File:
    """
    A file to read.

    Args:
        source (`str`): Its absolute path, or its URL.
        size (`int`, *optional*, defaults to 0): Bytes.
        version (`int`, *optional*, defaults to 0): What changes when it does: here its time in nanoseconds.
    """

    source: str
    size: int = 0
    version: int = 0


@dataclass
class Archive:
    """
    Files of an archive.

    Args:
        files (`list[File]`): Images and videos.
        tables (`list[str]`): Parquet files and tars with images and videos in them.
    """

    files: list[File] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)


def is_table(name: str) -> bool:
    return name.lower().endswith((".parquet", ".tar"))


def find_archive(source: str) -> Archive:
    """
    What there is in a folder and in those in it, or the one file that is named.

    Args:
        source (`str`): A path, or a URL of fsspec.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if a link in the folder leads out of it.
        OSError: if it cannot be read.
    """
    return _find_remote(source) if is_url(source) else _find_local(source)


def _find_local(source: str) -> Archive:
    if not os.path.isdir(source):
        check_regular(source)
        name = os.path.abspath(source)
        return Archive(tables=[name]) if is_table(name) else Archive([_local(name)])
    folder = Path(source).absolute()
    tables = sorted(path for path in folder.rglob("*") if is_table(path.name) and not path.is_dir())
    for path in tables:
        check_inside(folder, path)
    return Archive(list(map(_local, find_files(source))), list(map(str, tables)))


def _local(path: str) -> File:
    try:
        found = os.stat(path)
    except OSError:
        return File(path)  # reading it will say why
    return File(path, found.st_size, found.st_mtime_ns)


def _find_remote(source: str) -> Archive:
    from fsspec.core import url_to_fs

    files, root = url_to_fs(source)
    with remote_errors(source):
        found = files.find(root, detail=True)
    if not found:
        raise FileNotFoundError(f"nothing to read at {source}")
    archive, suffixes = Archive(), image_suffixes()
    for path, info in sorted(found.items()):
        url = files.unstrip_protocol(path)
        if is_table(path):
            archive.tables.append(url)
        elif is_video(path) or os.path.splitext(path)[1].lower() in suffixes:
            archive.files.append(File(url, int(info.get("size") or 0), _version(info)))
    return archive


def _version(info: dict[str, Any]) -> int:
    """A number that changes when a file does, made of what its server says of it."""
    said = [
        str(info[name]) for name in ("ETag", "LastModified", "mtime", "updated", "blob_id", "created") if name in info
    ]
    return int(hashlib.sha256(" ".join(said).encode()).hexdigest()[:15], 16) if said else 0


def read_source(source: str) -> Path | bytes:
    """
    A file here by its path, one behind a URL by its bytes.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
    """
    if not is_url(source):
        return Path(source)
    with _opened(source) as file, remote_errors(source):
        return file.read()


def read_table(source: str) -> Iterator[tuple[str, bytes]]:
    """
    Images and videos in a Parquet file or a tar: names, behind that of the file, and bytes.

    Raises:
        ValueError: if it is damaged, or has no images.
        OSError: if it cannot be read.
    """
    with _opened(source) as file, remote_errors(source):
        yield from (_read_tar if source.lower().endswith(".tar") else _read_parquet)(source, file)


def _opened(source: str) -> Any:
    if is_url(source):
        import fsspec

        return fsspec.open(source, "rb")
    check_regular(source)
    return open(source, "rb")


def _read_tar(source: str, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    suffixes = image_suffixes()
    try:
        with tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                is_wanted = os.path.splitext(member.name)[1].lower() in suffixes or is_video(member.name)
                if not member.isfile() or not is_wanted:
                    continue
                if member.size > MAX_MEMBER:
                    raise ValueError(f"{source} holds {member.name!r:.200} of {member.size:,} bytes")
                content = tar.extractfile(member)
                if content is not None:
                    yield f"{source}/{member.name}", content.read()
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{source} is damaged: {error}") from error


def _read_parquet(source: str, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as table:
            schema = table.schema_arrow
            column = next(
                (name for name in IMAGE_COLUMNS if name in schema.names and _is_image(schema.field(name))), None
            )
            if column is None:
                raise ValueError(f"it has no column of images: one of {', '.join(IMAGE_COLUMNS)}, of bytes")
            named = [name for name in NAME_COLUMNS if name in schema.names and name != column][:1]
            number = 0
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[column, *named]):
                batch.validate(full=True)
                for row in batch.to_pylist():
                    value = row[column]
                    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                    name = name or (row[named[0]] if named else None) or f"row {number}"
                    number += 1
                    yield f"{source}/{name}", data or b""
    except (pa.ArrowException, KeyError, TypeError) as error:
        raise ValueError(f"{source} is damaged: {error}") from error


def _is_image(found: Any) -> bool:
    import pyarrow as pa

    kind = found.type
    if pa.types.is_struct(kind):
        return "bytes" in [part.name for part in kind]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


__all__ = ["Archive", "File", "find_archive", "is_table", "read_source", "read_table"]
