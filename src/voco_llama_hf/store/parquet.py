"""A store as Parquet files, which `datasets` reads and writes: an archive as a data set of the Hub."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..files import check_inside, check_regular, new_folder
from ..modeling.fingerprint_voco_llama import check_fingerprint
from .errors import DamagedError
from .places import INDEX, is_url, remote_errors
from .rows import Packed, arrow_schema, as_text, from_row, to_row, to_table
from .store import Entry, VoCoStore


if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

ROW_GROUP_BYTES = 32_000_000  # of keys and values, about: what a reader of one row reads
FILE_BYTES = 500_000_000
SHARD_BYTES, SHARD_ROWS = 256_000_000, 4_096  # of a shard that is imported, at most
MAX_ERROR = 1_000  # characters
MAX_ROW_GROUP = 8_000_000_000  # bytes in memory, after decompression
ROWS_AT_A_TIME = 16
OPTIONAL = ("key_scales", "value_scales")
CARD = """---
tags:
- voco-llama
---

# Compressed images

{number} images and videos, compressed by VoCo-LLaMA: keys and values of a few tokens each. With
[voco-llama-hf](https://pypi.org/project/voco-llama-hf):

```python
from datasets import load_dataset

from voco_llama_hf.store import cache_from_row

row = load_dataset(PATH_OF_THIS_DATA_SET, split="train")[0]
cache = cache_from_row(row)  # wherever pixel_values goes, this goes as voco_cache
```

`voco-llama store import PATH --store STORE` makes a store of it. `fingerprint` says which model they were made by, and
are for.
"""


def export_parquet(
    store: VoCoStore, folder: str | os.PathLike[str]
) -> Iterator[tuple[Entry, DamagedError | OSError | None]]:
    """
    Writes every entry of a store to Parquet files of a new folder, as they are stored. The names of files are written
    without the folder that all of them lie in.

    Args:
        store ([`VoCoStore`]): Any store, also one that is read through a URL.
        folder (`str` or `os.PathLike`): Folder to write, which appears when all of it is written.

    Yields:
        `tuple`: Each entry, and why it is left out, if it is.

    Raises:
        ImportError: if `pyarrow` is not installed.
        FileExistsError: if the folder is there, and not empty.
        OSError: if it cannot be written.
    """
    schema = arrow_schema()
    shared = as_text(common_folder(store.sources()))
    with new_folder(Path(folder)) as aside:
        (aside / "data").mkdir()
        files = _Files(aside / "data", schema)
        try:
            for entry, found in store.packed():
                if isinstance(found, Packed):
                    row = to_row(found)
                    files.write(row | {"sources": [without_folder(source, shared) for source in row["sources"]]})
                yield entry, None if isinstance(found, Packed) else found
        finally:
            files.close()
        files.name_all()
        (aside / "README.md").write_text(CARD.format(number=f"{files.num_rows:,}"))


class _Files:
    """Parquet files of about one size, in row groups of about one size."""

    def __init__(self, folder: Path, schema: "pyarrow.Schema"):
        self.folder, self.schema = folder, schema
        self.num_rows = 0
        self._rows: list[dict[str, Any]] = []
        self._paths: list[Path] = []
        self._writer: ParquetWriter | None = None
        self._rows_bytes = self._file_bytes = 0

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self.num_rows += 1
        self._rows_bytes += len(row["keys"]) + len(row["values"])
        if self._rows_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            from pyarrow.parquet import ParquetWriter

            self._paths.append(self.folder / f"{len(self._paths):05d}.parquet")
            texts = ["num_voco_tokens", "num_images", "sampling", "dtype", "fingerprint"]
            # Keys and values are noise to a compressor
            kinds = {name: "none" if name in ("keys", "values") else "zstd" for name in self.schema.names}
            self._writer = ParquetWriter(self._paths[-1], self.schema, use_dictionary=texts, compression=kinds)
        self._writer.write_table(to_table(self._rows, self.schema))
        self._file_bytes += self._rows_bytes
        self._rows, self._rows_bytes = [], 0
        if self._file_bytes >= FILE_BYTES:
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._file_bytes = None, 0

    def name_all(self) -> None:
        """By the names of a data set's files, once it is known how many there are."""
        if self._rows or not self._paths:
            self._flush()
        self.close()
        for number, path in enumerate(self._paths):
            path.rename(self.folder / f"train-{number:05d}-of-{len(self._paths):05d}.parquet")


def common_folder(sources: Iterable[str]) -> str:
    """The folder that all sources with an absolute path lie in, if there is one."""
    paths = [os.path.dirname(source) for source in sources if os.path.isabs(source)]
    try:
        shared = os.path.commonpath(paths) if paths else ""
    except ValueError:  # on several drives
        return ""
    return "" if shared == os.sep else shared


def without_folder(source: str, folder: str) -> str:
    """The name of a file without the folder, of which nobody else needs to know."""
    return source.removeprefix(folder + os.sep) if folder else source


def find_parquet(source: str) -> list[str]:
    """
    Parquet files of a folder, of those in it, or the one that is named.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if a link in the folder leads out of it.
    """
    if is_url(source):
        from fsspec.core import url_to_fs

        files, root = url_to_fs(source)
        with remote_errors(source):
            found = sorted(files.glob(f"{root.rstrip('/')}/**/*.parquet")) if files.isdir(root) else [root]
            urls = [files.unstrip_protocol(path) for path in found]
        if not urls:
            raise FileNotFoundError(f"no Parquet files in {source}")
        return urls if "::" not in source else [source]
    folder = Path(source)
    if not folder.is_dir():
        check_regular(folder)
        return [source]
    paths = sorted(path for path in folder.rglob("*.parquet") if not path.is_dir())
    for path in paths:
        check_inside(folder, path)
        check_regular(path)
    if not paths:
        raise FileNotFoundError(f"no Parquet files in {source}")
    return list(map(str, paths))


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    if is_url(path):
        import fsspec

        with remote_errors(path), fsspec.open(path, "rb") as file:
            yield file
    else:
        check_regular(path)
        with open(path, "rb") as file:
            yield file


def read_parquet(path: str) -> Iterator[dict[str, Any]]:
    """
    Rows of a file of somebody else.

    Raises:
        DamagedError: if it is not a Parquet file, or has not the columns of compressed images.
        OSError: if it cannot be read.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    schema = arrow_schema()
    try:
        with _opened(path) as file, ParquetFile(file) as table:
            found = table.schema_arrow.names
            missing = [name for name in schema.names if name not in found and name not in OPTIONAL]
            if missing:
                raise ValueError(f"it has no column {', '.join(missing)}")
            wanted = [name for name in (*schema.names, "error") if name in found]
            for number in range(table.num_row_groups):
                if not 0 <= table.metadata.row_group(number).total_byte_size <= MAX_ROW_GROUP:
                    raise ValueError(f"a row group takes more than {MAX_ROW_GROUP:,} bytes")
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=wanted):
                batch.validate(full=True)
                yield from batch.to_pylist()
    except DamagedError:
        raise
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error


def import_parquet(
    sources: Iterable[str],
    store: str | os.PathLike[str],
    fingerprint: dict[str, str] | None = None,
    eight_bit: bool | None = None,
) -> Iterator[tuple[str, ValueError | None]]:
    """
    Puts rows of Parquet files into a store. What is there already is left as it is, and rows that are damaged or of
    another model are left out.

    Args:
        sources (`Iterable[str]`): Files, folders or URLs.
        store (`str` or `os.PathLike`): Folder of the store, made if it is not there.
        fingerprint (`dict[str, str]`, *optional*): `model.fingerprint()` of the model they are for; that of the first
            row by default.
        eight_bit (`bool`, *optional*): Whether a new store keeps 8 bits; as the first row does by default.

    Yields:
        `tuple`: The name of each row, and why it is left out, if it is.

    Raises:
        ImportError: if `pyarrow` is not installed.
        FileNotFoundError: if there is no such file.
        DamagedError: if a file is no Parquet file of compressed images. Nothing is written if it is the first.
        ValueError: if the store is of another model than the first row.
        OSError: if something cannot be read or written.
    """
    arrow_schema()
    paths = [path for source in sources for path in find_parquet(source)]
    into = _Importer(store, fingerprint, eight_bit)
    try:
        for path in paths:
            for number, row in enumerate(read_parquet(path)):
                yield f"{path}, row {number}", into.take(row)
        into.flush()
    finally:
        into.close()


@dataclass
class _Importer:
    """Rows that wait for a shard to be full, and the store, which is opened when the first sound one has come."""

    path: str | os.PathLike[str]
    fingerprint: dict[str, str] | None
    eight_bit: bool | None

    def __post_init__(self) -> None:
        self._store: VoCoStore | None = None
        self._waiting: list[Packed] = []
        self._waiting_bytes = 0
        self._failures: dict[str, str] = {}

    def take(self, row: dict[str, Any]) -> ValueError | None:
        """What is wrong with a row, if anything is."""
        if row.get("error") is not None:
            self._failures |= {str(source): str(row["error"])[:MAX_ERROR] for source in row["sources"] or ()}
            return None
        try:
            packed = from_row(row)
        except DamagedError as error:
            return error
        if self._store is None:
            self._store = self._open(packed)
        try:
            check_fingerprint(packed.fingerprint, self._store.fingerprint, f"the store {self.path}", "the row")
        except ValueError as error:
            return error
        self._waiting.append(packed)
        self._waiting_bytes += sum(tensor.nbytes for tensor in packed.tensors.values())
        if self._waiting_bytes >= SHARD_BYTES or len(self._waiting) >= SHARD_ROWS:
            self.flush()
        return None

    def _open(self, packed: Packed) -> VoCoStore:
        is_new = not (Path(self.path) / INDEX).exists()
        eight_bit = "key_scales" in packed.tensors if self.eight_bit is None and is_new else self.eight_bit
        return VoCoStore(self.path, self.fingerprint or packed.fingerprint, eight_bit)

    def flush(self) -> None:
        if self._store is not None:
            self._store.add_packed(self._waiting)
            self._store.record_failures(self._failures)
        self._waiting, self._waiting_bytes, self._failures = [], 0, {}

    def close(self) -> None:
        if self._store is not None:
            self._store.close()


__all__ = ["export_parquet", "find_parquet", "import_parquet", "read_parquet"]
