"""Shards: safetensors files with the VoCo tokens of many entries, which say themselves what they hold."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors.torch import save_file

from ..modeling.cache_voco_llama import VoCoCache, check_cache, digest
from ..modeling.files_voco_llama import apply_umask, written_aside
from ..modeling.fingerprint_voco_llama import check_fingerprint
from .content import Content
from .errors import DamagedError
from .places import ByteFile
from .tensor_file import TensorFile


FORMAT, VERSION = "voco_store_shard", "2"
UNCHECKED_VERSION = "1"  # without a checksum of its header
ASIDE = "shard"  # what folders are called in which shards are written
TENSORS = ("keys", "values", "key_scales", "value_scales")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Record:
    """
    An entry of a shard.

    Args:
        content ([`Content`]): What it is.
        num_voco_tokens (`int`): VoCo tokens of an image or frame.
        num_images (`int`): 1 for an image, frames of a video.
        first_token (`int`): Where its tokens start in the shard.
        sha256 (`str`): Checksum of its tensors as they are stored.
        added (`str`): When it was compressed, in ISO 8601, UTC.
    """

    content: Content
    num_voco_tokens: int
    num_images: int
    first_token: int
    sha256: str
    added: str

    @property
    def num_tokens(self) -> int:
        return self.num_voco_tokens * self.num_images


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Keys or values in 8 bits, with a scale for every head of every token.

    Args:
        states (`torch.Tensor` of shape `(tokens, layers, key_value_heads, head_dim)`): What to store.

    Returns:
        `(torch.Tensor, torch.Tensor)`: int8 of the same shape, and bfloat16 scales `(tokens, layers,
        key_value_heads)`.
    """
    largest = states.float().abs().amax(-1)
    # Rounded up, so that the largest number is not cut off
    scales = (largest / 127 * (1 + 2**-8)).clamp(min=1e-20).bfloat16()
    rounded = (states.float() / scales.float()[..., None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scales


def dequantize(rounded: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What [`quantize`] stored, at most half a scale away from what it was."""
    return (rounded.float() * scales.float()[..., None]).to(dtype)


def pack(cache: VoCoCache, eight_bit: bool) -> Tensors:
    """The tensors of a cache as a shard holds them."""
    if not eight_bit:
        return {"keys": cache.keys.cpu(), "values": cache.values.cpu()}
    keys, key_scales = quantize(cache.keys.cpu())
    values, value_scales = quantize(cache.values.cpu())
    return {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}


def single_k(cache: VoCoCache) -> int:
    """
    VoCo tokens of every image of an entry.

    Raises:
        ValueError: if they differ, or there is no image.
    """
    if len(set(cache.token_counts)) != 1:
        raise ValueError(f"an entry needs one number of VoCo tokens for all its images, got {cache.token_counts}")
    return cache.token_counts[0]


def write_shard(
    folder: Path, contents: Sequence[Content], caches: Sequence[VoCoCache], eight_bit: bool
) -> tuple[Path, list[Record]]:
    """
    Writes entries to a new shard. It appears under its name only when all of it is on the disk.

    Raises:
        ValueError: if the images of a cache have different numbers of VoCo tokens, or models differ.
    """
    first, now = caches[0], datetime.now(UTC).isoformat(timespec="seconds")
    packed, records, start = [], [], 0
    for content, cache in zip(contents, caches, strict=True):
        check_fingerprint(cache.fingerprint, first.fingerprint, "the first entry")
        tensors = pack(cache.to(first.dtype), eight_bit)
        packed.append(tensors)
        records.append(Record(content, single_k(cache), len(cache), start, digest(*tensors.values()), now))
        start += records[-1].num_tokens
    return save_shard(folder, packed, records, first.fingerprint, first.dtype), records


def save_shard(
    folder: Path, packed: Sequence[Tensors], records: Sequence[Record], fingerprint: dict[str, str], dtype: torch.dtype
) -> Path:
    """Tensors and records, one of each an entry, as a file: aside, to the disk, then under its name."""
    tensors = {name: torch.cat([entry[name] for entry in packed]).contiguous() for name in packed[0]}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": json.dumps(fingerprint),
        "dtype": str(dtype).removeprefix("torch."),
        "records": json.dumps([asdict(record) for record in records]),
    }
    metadata["sha256"] = _header_digest(metadata, {name: _described(tensor) for name, tensor in tensors.items()})
    path = folder / f"{uuid4().hex}.safetensors"
    with written_aside(path, group=ASIDE) as aside:
        save_file(tensors, aside, metadata=metadata)
        apply_umask(aside)
    return path


def _described(tensor: torch.Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype), list(tensor.shape)


def _header_digest(metadata: dict[str, str], tensors: dict[str, tuple[str, list[int]]]) -> str:
    """SHA-256 of what a shard says of its tensors; that of the tensors themselves is in the records."""
    said = {name: metadata[name] for name in ("fingerprint", "dtype", "records")}
    return hashlib.sha256(json.dumps([said, tensors], sort_keys=True).encode()).hexdigest()


class Shard:
    """
    A shard opened for reading; tensors stay on the disk until they are asked for.

    Args:
        file (`ByteFile`): The file, which is closed with this.

    Raises:
        DamagedError: if it is damaged or something else.
        OSError: if it cannot be read.
    """

    def __init__(self, file: ByteFile):
        self.name = file.name
        self._file = TensorFile(file)
        metadata, layout = self._file.metadata, self._file.layout
        with self._damaged():
            if metadata.get("format") != FORMAT or metadata.get("version") not in (VERSION, UNCHECKED_VERSION):
                raise ValueError(f"it is not a shard of version {VERSION}")
            check_layout({name: (dtype, shape) for name, (dtype, shape, _, _) in layout.items()})
            tensors = {name: (str(dtype), list(shape)) for name, (dtype, shape, _, _) in layout.items()}
            if metadata["version"] == VERSION and metadata["sha256"] != _header_digest(metadata, tensors):
                raise ValueError("its header does not match its checksum")
            self.fingerprint = check_texts(json.loads(metadata["fingerprint"]))
            self.dtype = DTYPES[metadata["dtype"]]
            self.num_tokens = layout["keys"][1][0]
            self._records = metadata["records"]

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
            raise DamagedError(f"{self.name} is damaged: {error}") from error

    def close(self) -> None:
        self._file.close()

    def records(self) -> list[Record]:
        """
        What it holds.

        Raises:
            DamagedError: if that does not fit its tensors.
        """
        with self._damaged():
            return [self._record(said) for said in json.loads(self._records)]

    def _record(self, said: dict[str, Any]) -> Record:
        record = Record(**{**said, "content": Content(**said["content"])})
        check_record(record, self.num_tokens)
        return record

    def tensors(self, first_token: int, num_tokens: int, sha256: str) -> Tensors:
        """
        The tensors of an entry as they are stored.

        Raises:
            DamagedError: if they do not match their checksum.
            OSError: if they cannot be read.
        """
        tensors = self._file.rows([name for name in TENSORS if name in self._file.layout], first_token, num_tokens)
        if digest(*tensors.values()) != sha256:
            raise DamagedError(f"{self.name} is damaged: an entry does not match its checksum")
        return tensors

    def read(self, first_token: int, num_images: int, num_voco_tokens: int, sha256: str) -> VoCoCache:
        """An entry as a cache, in the dtype that it was compressed in."""
        tensors = self.tensors(first_token, num_images * num_voco_tokens, sha256)
        with self._damaged():
            return unpack(tensors, self.dtype, [num_voco_tokens] * num_images, self.fingerprint)


def unpack(tensors: Tensors, dtype: torch.dtype, token_counts: list[int], fingerprint: dict[str, str]) -> VoCoCache:
    """
    What [`pack`] was given.

    Raises:
        ValueError: if it is no sound cache.
    """
    keys, values = tensors["keys"], tensors["values"]
    if "key_scales" in tensors:
        keys = dequantize(keys, tensors["key_scales"], dtype)
        values = dequantize(values, tensors["value_scales"], dtype)
    elif keys.dtype != dtype:
        raise ValueError(f"its keys are {keys.dtype}, not {dtype}")
    cache = VoCoCache(keys, values, token_counts, fingerprint)
    check_cache(cache, what="an entry")
    return cache


def check_record(record: Record, num_tokens: int) -> None:
    """
    Raises:
        ValueError: if something in it is of another type than is said, or it does not fit so many tokens.
    """
    content = record.content
    texts = (content.content_hash, content.sampling, content.source, record.sha256, record.added)
    sizes = (content.size, record.first_token)
    counts = (record.num_voco_tokens, record.num_images)
    if not (
        all(type(text) is str for text in texts)
        and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
        and all(type(count) is int and 0 < count <= num_tokens for count in counts)
        and type(content.mtime_ns) is int
        and -(2**63) <= content.mtime_ns < 2**63
        and isinstance(content.metadata, dict)
        and record.first_token + record.num_tokens <= num_tokens
    ):
        raise ValueError("an entry does not fit its tensors")


def check_layout(layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """Keys and values of one shape and dtype, and in 8 bits a scale for every head of every token."""
    dtype, shape = layout["keys"]
    expected = {"keys": (dtype, shape), "values": (dtype, shape)}
    if dtype == torch.int8:
        expected |= dict.fromkeys(("key_scales", "value_scales"), (torch.bfloat16, shape[:-1]))
    if layout != expected or len(shape) != 4:
        raise ValueError("its tensors are not those of a shard")


def check_texts(said: object) -> dict[str, str]:
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("its fingerprint is no object of texts")
    return said
