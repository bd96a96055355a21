"""Shards: safetensors files with the VoCo tokens of many entries, which say themselves what they hold."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..modeling.cache_voco_llama import VoCoCache, apply_umask, check_cache, digest
from ..modeling.fingerprint_voco_llama import check_fingerprint
from .content import Content


FORMAT, VERSION = "voco_store_shard", "1"
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
    path = folder / f"{uuid4().hex}.safetensors"
    aside = path.with_suffix(".part")
    try:
        save_file(tensors, aside, metadata=metadata)
        apply_umask(aside)
        _to_disk(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    _to_disk(folder)
    return path


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Shard:
    """
    A shard opened for reading; tensors stay on the disk until they are asked for.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or something else.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            metadata = self._file.metadata() or {}
            if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not a shard of version {VERSION}")
            self.fingerprint: dict[str, str] = json.loads(metadata["fingerprint"])
            self.dtype: torch.dtype = getattr(torch, metadata["dtype"])
            self._records = metadata["records"]
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing") from error
            raise ValueError(f"{path} is damaged: {error}") from error

    @property
    def num_tokens(self) -> int:
        return self._file.get_slice("keys").get_shape()[0]

    def records(self) -> Iterator[Record]:
        for record in json.loads(self._records):
            yield Record(**{**record, "content": Content(**record["content"])})

    def tensors(self, first_token: int, num_tokens: int, sha256: str) -> Tensors:
        """
        The tensors of an entry as they are stored.

        Raises:
            ValueError: if they do not match their checksum.
        """
        rows = slice(first_token, first_token + num_tokens)
        names = ("keys", "values", "key_scales", "value_scales")
        tensors = {name: self._file.get_slice(name)[rows] for name in names if name in self._file.keys()}  # noqa: SIM118
        if digest(*tensors.values()) != sha256:
            raise ValueError(f"{self.path} is damaged: an entry does not match its checksum")
        return tensors

    def read(self, first_token: int, num_images: int, num_voco_tokens: int, sha256: str) -> VoCoCache:
        """An entry as a cache, in the dtype that it was compressed in."""
        tensors = self.tensors(first_token, num_images * num_voco_tokens, sha256)
        keys, values = tensors["keys"], tensors["values"]
        if "key_scales" in tensors:
            keys = dequantize(keys, tensors["key_scales"], self.dtype)
            values = dequantize(values, tensors["value_scales"], self.dtype)
        cache = VoCoCache(keys, values, [num_voco_tokens] * num_images, self.fingerprint)
        check_cache(cache, what=f"an entry of {self.path}")
        return cache
