"""A safetensors file of somebody else, read by range: nothing is mapped, and nothing believed."""

import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import DamagedError
from .places import ByteFile


MAX_HEADER = 100_000_000  # bytes, as in safetensors
MAX_DIMENSIONS = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8}


class TensorFile:
    """
    Header of a safetensors file, and rows of its tensors when they are asked for.

    Args:
        file (`ByteFile`): The file, which is closed with this.

    Raises:
        DamagedError: if it is not a safetensors file of floating point and int8 tensors.
        OSError: if it cannot be read.
    """

    def __init__(self, file: ByteFile):
        self._file = file
        try:
            header = self._header()
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its metadata are no texts")
            self.metadata: dict[str, str] = metadata
            self.layout = {name: self._described(entry) for name, entry in header.items()}
            self._check_spans()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            self.close()
            raise DamagedError(f"{file.name} is damaged: {error}") from error
        except BaseException:
            self.close()
            raise

    def _header(self) -> dict[str, Any]:
        length = int.from_bytes(self._file.read([(0, 8)])[0], "little")
        if length > min(self._file.size - 8, MAX_HEADER):
            raise ValueError("it has no header of safetensors")
        self._start = 8 + length
        header = json.loads(self._file.read([(8, length)])[0])
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        return header

    @staticmethod
    def _described(entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        """Dtype, shape, and where its bytes start and end."""
        shape, (start, end) = entry["shape"], entry["data_offsets"]
        if len(shape) > MAX_DIMENSIONS or not all(type(number) is int and 0 < number < 2**63 for number in shape):
            raise ValueError(f"a tensor has the shape {str(shape)[:80]}")
        if not type(start) is type(end) is int:
            raise ValueError("an offset is no number")
        dtype = DTYPES[entry["dtype"]]
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"a tensor of shape {shape} takes {end - start} bytes")
        return dtype, tuple(shape), start, end

    def _check_spans(self) -> None:
        """Tensors follow each other without gaps and overlaps to the end of the file."""
        position = 0
        for _, _, start, end in sorted(self.layout.values(), key=lambda described: described[2:]):
            if start != position:
                raise ValueError("tensors overlap or leave gaps")
            position = end
        if self._start + position != self._file.size:
            raise ValueError(f"it has {self._file.size} bytes, {self._start + position} were expected")

    def rows(self, names: Sequence[str], first: int, number: int) -> dict[str, torch.Tensor]:
        """
        The same rows of some tensors.

        Raises:
            DamagedError: if there are no such rows.
            OSError: if they cannot be read.
        """
        spans = [self._span(name, first, number) for name in names]
        found = self._file.read(spans)
        if [len(content) for content in found] != [length for _, length in spans]:
            raise DamagedError(f"{self._file.name} is damaged: it ends early")
        tensors = {}
        for name, content in zip(names, found):
            dtype, shape, _, _ = self.layout[name]
            tensors[name] = torch.frombuffer(content, dtype=dtype).view(number, *shape[1:])
        return tensors

    def _span(self, name: str, first: int, number: int) -> tuple[int, int]:
        """Where bytes of rows start in the file, and how many they are."""
        dtype, shape, start, _ = self.layout[name]
        if not shape or first < 0 or number < 1 or first + number > shape[0]:
            raise DamagedError(f"{self._file.name} is damaged: {name} has no rows {first} to {first + number}")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        return self._start + start + first * row_bytes, number * row_bytes

    def close(self) -> None:
        self._file.close()


__all__ = ["TensorFile"]
