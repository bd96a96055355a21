"""A compressed image as a value: the keys and values of its VoCo tokens, on disk or in memory."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .layout_voco_llama import per_image_counts


FILE_FORMAT = "voco_cache"
FILE_VERSION = "1"


class TokenBuffer:
    """Rows that are appended at the end and forgotten at the front, without copying all of them every time."""

    def __init__(self, rows: torch.Tensor):
        self.room = rows
        self.start, self.end = 0, len(rows)

    def append(self, rows: torch.Tensor, num_forgotten: int) -> torch.Tensor:
        """What is held now, as a view; views handed out before stay as they are."""
        if self.end + len(rows) > len(self.room):
            held = self.room[self.start : self.end]
            self.room = held.new_empty(2 * (len(held) + len(rows)), *held.shape[1:])
            self.room[: len(held)] = held
            self.start, self.end = 0, len(held)
        self.room[self.end : self.end + len(rows)] = rows
        self.start, self.end = self.start + num_forgotten, self.end + len(rows)
        return self.room[self.start : self.end]


class VoCoCache:
    r"""
    Compressed images, one entry an image, made by [`VoCoLlamaForConditionalGeneration.compress`].

    An entry holds the keys and values of the image's k VoCo tokens in every layer, the keys rotated to positions
    0..k-1: exactly `2 * layers * key_value_heads * k * head_dim` numbers, and nothing else is left of the image.

    Args:
        keys (`torch.Tensor` of shape `(tokens, layers, key_value_heads, head_dim)`):
            Keys of the VoCo tokens of all images, image after image.
        values (`torch.Tensor` of the same shape):
            Values of the same tokens.
        token_counts (`Sequence[int]`):
            VoCo tokens of each image.
        fingerprint (`dict[str, str]`):
            What the entries were made by: configuration and weights of the model.

    Raises:
        ValueError: if the shapes do not fit each other or `token_counts`.

    Example:

    ```python
    >>> cache = model.compress(pixel_values, num_voco_tokens=2)
    >>> cache.save("photos.safetensors")
    >>> first, rest = cache[0], cache[1:]
    >>> inputs = processor(text="<image>\nWhat is this?", voco_cache=first, return_tensors="pt")
    >>> model.generate(**inputs, voco_cache=first)
    >>> cache.append(model.compress(next_frame, num_voco_tokens=2), window=1000)
    ```"""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, token_counts: Sequence[int], fingerprint: dict[str, str]
    ):
        if keys.shape != values.shape or keys.ndim != 4 or keys.dtype != values.dtype:
            raise ValueError(
                "keys and values must share one dtype and one shape (tokens, layers, key_value_heads, head_dim), got "
                f"{tuple(keys.shape)} {keys.dtype} and {tuple(values.shape)} {values.dtype}"
            )
        if sum(token_counts) != keys.shape[0] or any(count < 1 for count in token_counts):
            raise ValueError(
                f"{keys.shape[0]} VoCo tokens cannot be divided into images of {list(token_counts)} tokens"
            )
        self.keys = keys
        self.values = values
        self.token_counts = list(token_counts)
        self.fingerprint = dict(fingerprint)
        self._buffers: tuple[TokenBuffer, TokenBuffer] | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(images={len(self)}, num_voco_tokens={self.num_voco_tokens}, nbytes={self.nbytes}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __len__(self) -> int:
        return len(self.token_counts)

    def __iter__(self) -> Iterator["VoCoCache"]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice | Sequence[int]) -> "VoCoCache":
        """Some of the images, as another cache: `cache[0]`, `cache[2:5]`, `cache[[3, 0, 3]]`."""
        images = range(len(self))[index] if isinstance(index, (int, slice)) else [range(len(self))[i] for i in index]
        images = [images] if isinstance(images, int) else list(images)
        counts = [self.token_counts[i] for i in images]
        # A run of neighbours stays a view; anything else gathers its tokens
        if images and images == list(range(images[0], images[0] + len(images))):
            start = sum(self.token_counts[: images[0]])
            tokens: slice | torch.Tensor = slice(start, start + sum(counts))
        else:
            spans = torch.arange(self.keys.shape[0]).split(self.token_counts)
            tokens = torch.cat([spans[i] for i in images] or [torch.empty(0, dtype=torch.long)]).to(self.device)
        return type(self)(self.keys[tokens], self.values[tokens], counts, self.fingerprint)

    @property
    def num_voco_tokens(self) -> int | list[int]:
        """VoCo tokens of an image: one number if all images have the same, else one number an image."""
        return self.token_counts[0] if len(set(self.token_counts)) == 1 else list(self.token_counts)

    @property
    def nbytes(self) -> int:
        """Bytes that the keys and values take."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def resolve(self, num_voco_tokens: int | list[int] | torch.Tensor | None) -> list[int]:
        """
        `token_counts`, which a call may name as `num_voco_tokens` but not change.

        Raises:
            ValueError: if it names other numbers.
        """
        if num_voco_tokens is not None and per_image_counts(num_voco_tokens, len(self)) != self.token_counts:
            raise ValueError(
                f"num_voco_tokens={num_voco_tokens} was asked of a voco_cache that has {self.token_counts} VoCo tokens"
            )
        return self.token_counts

    @classmethod
    def cat(cls, caches: Sequence["VoCoCache"]) -> "VoCoCache":
        """
        Several caches as one, in order. Dtype and device are those of the first.

        Args:
            caches (`Sequence[VoCoCache]`): Caches of one model.

        Raises:
            ValueError: if there is none, or if they were made by different models.
        """
        if len(caches) == 0:
            raise ValueError("VoCoCache.cat needs at least one cache")
        first = caches[0]
        for other in caches[1:]:
            check_fingerprint(other.fingerprint, first.fingerprint, "the first cache")
        keys = torch.cat([cache.keys.to(first.keys) for cache in caches])
        values = torch.cat([cache.values.to(first.values) for cache in caches])
        return cls(keys, values, [count for cache in caches for count in cache.token_counts], first.fingerprint)

    def append(self, other: "VoCoCache", window: int | None = None) -> None:
        """
        Adds images at the end, as frames of a stream arrive. What is held is copied only when its room doubles, so a
        frame costs the same however many came before.

        Args:
            other ([`VoCoCache`]):
                The new images. They take the dtype and device of this cache.
            window (`int`, *optional*):
                Images to keep: the oldest are forgotten.

        Raises:
            ValueError: if `other` was made by another model, or `window` is below 1.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        check_fingerprint(other.fingerprint, self.fingerprint, "this one")
        counts = [*self.token_counts, *other.token_counts]
        kept = counts if window is None else counts[-window:]
        if self._buffers is None:
            self._buffers = TokenBuffer(self.keys), TokenBuffer(self.values)
        keys, values = self._buffers
        self.keys = keys.append(other.keys, sum(counts) - sum(kept))
        self.values = values.append(other.values, sum(counts) - sum(kept))
        self.token_counts = kept

    def to(self, *args, **kwargs) -> "VoCoCache":
        """
        The same images on another device or in another dtype.

        Args:
            args, kwargs: What [`torch.Tensor.to`] takes: a device, a dtype, or both.

        Returns:
            [`VoCoCache`], which shares its tensors with this one where nothing changes.
        """
        keys, values = self.keys.to(*args, **kwargs), self.values.to(*args, **kwargs)
        return type(self)(keys, values, self.token_counts, self.fingerprint)

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes a safetensors file, aside first and then renamed: an interrupted save leaves the old file.

        Args:
            path (`str` or `os.PathLike`): File to write, or to replace.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("keys", "values")}
        # Slices of one storage are views, which safetensors refuses to write twice
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        metadata = {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "num_voco_tokens": json.dumps(self.token_counts),
            "fingerprint": json.dumps(self.fingerprint),
            "sha256": digest(tensors["keys"], tensors["values"]),
        }
        handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, aside, metadata=metadata)
            apply_umask(aside)
            os.replace(aside, path)
        except BaseException:
            os.unlink(aside)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> "VoCoCache":
        """
        Reads what [`VoCoCache.save`] wrote.

        Args:
            path (`str` or `os.PathLike`): File to read.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to put keys and values.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no VoCoCache file at {path}")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        if metadata.get("format") != FILE_FORMAT or set(tensors) != {"keys", "values"}:
            raise ValueError(f"{path} is a safetensors file, but not one that VoCoCache.save wrote")
        if metadata.get("version") != FILE_VERSION:
            raise ValueError(
                f"{path} has VoCoCache version {metadata.get('version')}, this package reads {FILE_VERSION}"
            )
        if metadata.get("sha256") != digest(tensors["keys"], tensors["values"]):
            raise ValueError(f"{path} is damaged: its content does not match its checksum")
        try:
            counts, fingerprint = json.loads(metadata["num_voco_tokens"]), json.loads(metadata["fingerprint"])
            return cls(tensors["keys"], tensors["values"], counts, fingerprint)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its metadata does not describe its tensors ({error})") from error


def check_fingerprint(
    made_by: dict[str, str], expected: dict[str, str], owner: str, what: str = "this VoCoCache"
) -> None:
    """
    Compares what two caches, or a cache and a model, were made by.

    Raises:
        ValueError: if they differ; the message says where.
    """
    names = [name for name in expected | made_by if made_by.get(name) != expected.get(name)]
    if names:
        differences = ", ".join(f"{name} is {made_by.get(name)}, not {expected.get(name)}" for name in names)
        raise ValueError(f"{what} was made by another model than {owner}: {differences}")


def apply_umask(path: str | os.PathLike) -> None:
    """Gives a file that was written for its owner alone the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def digest(*tensors: torch.Tensor) -> str:
    """SHA-256 over the bytes of tensors."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return sha256.hexdigest()


__all__ = ["VoCoCache"]
