"""
Compressed images as rows of a table, for Parquet, Arrow and data sets. Arrow has no bfloat16, so keys and values are
bytes, with their dtype and shape beside them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any

import torch

from ..modeling.cache_voco_llama import VoCoCache, digest
from .content import Content
from .errors import DamagedError
from .shards import DTYPES, TENSORS, Record, Tensors, check_layout, check_record, check_texts, unpack


if TYPE_CHECKING:
    import pyarrow

MAX_SHAPE = 4  # dimensions: tokens, layers, heads of keys and values, numbers of a head


def arrow_schema() -> "pyarrow.Schema":
    """
    Columns of compressed images.

    Raises:
        ImportError: if `pyarrow` is not installed.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("content_hash", pa.string()),
            ("num_voco_tokens", pa.int32()),
            ("num_images", pa.int32()),
            ("sampling", pa.string()),
            ("dtype", pa.string()),
            ("shape", pa.list_(pa.int64())),
            ("keys", pa.large_binary()),
            ("values", pa.large_binary()),
            ("key_scales", pa.large_binary()),
            ("value_scales", pa.large_binary()),
            ("sha256", pa.string()),
            ("size", pa.int64()),
            ("sources", pa.list_(pa.string())),
            ("metadata", pa.string()),
            ("added", pa.string()),
            ("fingerprint", pa.string()),
        ]
    )


@dataclass(frozen=True)
class Packed:
    """
    An entry as it is stored.

    Args:
        record ([`Record`]): What it is; it starts at token 0.
        tensors (`dict[str, torch.Tensor]`): Keys and values, and in 8 bits their scales.
        dtype (`torch.dtype`): What it was compressed in.
        fingerprint (`dict[str, str]`): What it was made by.
        sources (`tuple[str, ...]`): Where the content was found.
    """

    record: Record
    tensors: Tensors
    dtype: torch.dtype
    fingerprint: dict[str, str]
    sources: tuple[str, ...] = ()

    def unpack(self) -> VoCoCache:
        """
        Raises:
            ValueError: if it is no sound cache.
        """
        counts = [self.record.num_voco_tokens] * self.record.num_images
        return unpack(self.tensors, self.dtype, counts, self.fingerprint)


def to_row(packed: Packed) -> dict[str, Any]:
    """An entry as a row of [`arrow_schema`]. What is no text in the name of a source is escaped."""
    record, content = packed.record, packed.record.content
    return {
        "content_hash": content.content_hash,
        "num_voco_tokens": record.num_voco_tokens,
        "num_images": record.num_images,
        "sampling": content.sampling,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.tensors["keys"].shape),
        **{name: _to_bytes(packed.tensors.get(name)) for name in TENSORS},
        "sha256": record.sha256,
        "size": content.size,
        "sources": list(map(as_text, packed.sources)),
        "metadata": json.dumps(content.metadata),
        "added": record.added,
        "fingerprint": json.dumps(packed.fingerprint),
    }


def to_table(rows: Sequence[Mapping[str, Any]], schema: "pyarrow.Schema | None" = None) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.Table.from_pylist(list(rows), schema=schema or arrow_schema())


def as_text(name: str) -> str:
    """The name of a file, which need not be text, as text."""
    return name.encode("utf-8", "backslashreplace").decode()


def from_row(row: Mapping[str, Any]) -> Packed:
    """
    Reads a row of somebody else, of which nothing is believed.

    Raises:
        DamagedError: if a column is missing or of another type, or tensors do not match their shape or checksum.
    """
    try:
        dtype = DTYPES[row["dtype"]]
        tensors = _read_tensors(row, dtype)
        sources = tuple(row["sources"])
        content = Content(
            row["content_hash"], row["sampling"], "".join(sources[:1]), index(row["size"]), 0, _object(row["metadata"])
        )
        counts = index(row["num_voco_tokens"]), index(row["num_images"])
        record = Record(content, *counts, 0, row["sha256"], row["added"])
        check_record(record, len(tensors["keys"]))
        if record.num_tokens != len(tensors["keys"]) or not all(type(name) is str for name in sources):
            raise ValueError("its columns do not fit its tensors")
        packed = Packed(record, tensors, dtype, check_texts(_object(row["fingerprint"])), sources)
        packed.unpack()
    except DamagedError:
        raise
    except KeyError as error:
        raise DamagedError(f"the row is damaged: nothing is known of {str(error)[:80]}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"the row is damaged: {str(error)[:300]}") from error
    return packed


def cache_from_row(row: Mapping[str, Any]) -> VoCoCache:
    """
    The compressed image, or frames, of a row of `voco-llama store export`, [`VoCoCompressor`] or a data set of them.

    Args:
        row (`Mapping`): A row as a dictionary, as `datasets` gives it.

    Raises:
        DamagedError: if it is not what was written; it is a `ValueError`.

    Example:

    ```python
    >>> row = load_dataset("user/compressed-photos", split="train")[0]
    >>> cache = cache_from_row(row)
    >>> inputs = processor(text="<image>\\nWhat is this?", voco_cache=cache, return_tensors="pt")
    >>> model.generate(**inputs, voco_cache=cache)
    ```

    A row whose `sampling` is `"tiles"` is one image of several entries: the processor is told so by
    `num_tiles=len(cache)`."""
    return from_row(row).unpack()


def _to_bytes(tensor: torch.Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _read_tensors(row: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    shape = tuple(map(index, row["shape"]))
    if len(shape) != MAX_SHAPE or not all(0 < number < 2**31 for number in shape):
        raise ValueError(f"its keys have the shape {str(shape)[:80]}")
    is_8_bit = row.get("key_scales") is not None
    kinds = dict.fromkeys(TENSORS[:2], (torch.int8 if is_8_bit else dtype, shape))
    if is_8_bit:
        kinds |= dict.fromkeys(TENSORS[2:], (torch.bfloat16, shape[:-1]))
    check_layout(kinds)
    tensors = {}
    for name, (kind, size) in kinds.items():
        content = row[name]
        if not isinstance(content, bytes) or len(content) != math.prod(size) * kind.itemsize:
            raise ValueError(f"{name} are not the bytes of {size} {kind}")
        tensors[name] = torch.frombuffer(bytearray(content), dtype=kind).view(size)
    if digest(*tensors.values()) != row["sha256"]:
        raise ValueError("its tensors do not match their checksum")
    return tensors


def _object(text: str) -> dict[str, Any]:
    said = json.loads(text)
    if not isinstance(said, dict):
        raise ValueError("metadata or fingerprint is no object")
    return said


__all__ = ["Packed", "arrow_schema", "cache_from_row", "from_row", "to_row", "to_table"]
