"""Files into a store: read ahead, compressed in batches, written shard by shard, on one process or many."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Dataset

from ..images import open_image
from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..pictures import prepare
from ..videos import is_video
from .compression import Compression, Sampling
from .content import Content
from .processes import Processes
from .shards import write_shard
from .store import VoCoStore


if TYPE_CHECKING:
    from transformers import BaseImageProcessor


@dataclass(frozen=True)
class Indexed:
    """
    What became of a file.

    Args:
        path (`str`): The file.
        num_images (`int`): Images or frames that were compressed; 0 for a content that is stored already.
        num_tokens (`int`): VoCo tokens they were compressed into.
        error (`str`, *optional*): Why it cannot be read.
    """

    path: str
    num_images: int = 0
    num_tokens: int = 0
    error: str | None = None


def image_suffixes() -> set[str]:
    """Endings of names of images, in small letters."""
    from PIL import Image

    return Image.registered_extensions().keys() - {".pdf"}


def find_files(folder: str | os.PathLike[str]) -> list[str]:
    """Images and videos in a folder and in those in it, by their suffix, and folders that cannot be read; in order."""
    suffixes = image_suffixes()
    closed: list[str] = []
    walk = os.walk(os.fspath(folder), onerror=lambda error: closed.append(os.path.abspath(error.filename)))
    files = (Path(root, name) for root, _, names in walk for name in names)
    found = [str(path.absolute()) for path in files if path.suffix.lower() in suffixes or is_video(path)]
    return sorted(found + closed)


@dataclass
class FileReader(Dataset):
    """Content of each file and, of an image, its pixels, or what is wrong with it."""

    files: Sequence[str]
    image_processor: "BaseImageProcessor"
    sampling: Sampling

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Content | None, dict[str, torch.Tensor] | None, str | None]:
        path = self.files[index]
        try:
            content = Content.of_file(path, self.sampling.of(path))
            if is_video(path):
                return path, content, None, None
            return path, content, prepare(self.image_processor, open_image(path)), None
        except Exception as error:  # whatever is wrong with a file is wrong with this one alone
            return path, None, None, str(error) or type(error).__name__


@dataclass
class Indexer:
    """
    Compresses files into a store.

    Args:
        path (`Path`):
            Folder of the store.
        model ([`VoCoLlamaForConditionalGeneration`]):
            What compresses.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
        num_voco_tokens (`int`):
            VoCo tokens of an image, tile or frame.
        sampling ([`Sampling`]):
            Which of them, and which frames of videos are taken.
        eight_bit (`bool`, *optional*):
            Whether a new store keeps keys and values in 8 bits.
        batch_size (`int`, *optional*, defaults to 16):
            Images or frames that are compressed at a time.
        shard_images (`int`, *optional*, defaults to 512):
            Images or frames after which a shard is written: what a kill can lose.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that read files ahead.
    """

    path: Path
    model: VoCoLlamaForConditionalGeneration
    processor: VoCoLlamaProcessor
    num_voco_tokens: int
    sampling: Sampling
    eight_bit: bool | None = None
    batch_size: int = 16
    shard_images: int = 512
    num_workers: int = 0
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        self._images: list[tuple[Content, dict[str, torch.Tensor]]] = []
        self._entries: list[tuple[Content, VoCoCache]] = []
        self._known: set[tuple[str, str]] = set()
        self._repeated: list[Content] = []
        self._failures: dict[str, str] = {}
        # The index has one writer, which takes in the shards of all others
        fingerprint = self._compression.fingerprint()
        self.store = VoCoStore(self.path, fingerprint, self.eight_bit) if self.processes.is_main else None
        self._eight_bit: bool = self.processes.broadcast(None if self.store is None else self.store.eight_bit)

    @property
    def _compression(self) -> Compression:
        return Compression(self.model, self.processor, self.num_voco_tokens, self.sampling, self.batch_size)

    def select(self, files: Sequence[str]) -> list[str]:
        """This process's share of the files that are new or have changed."""
        todo: list[str] = []
        known: set[tuple[str, str]] = set()
        if self.store is not None:
            todo = [path for path in files if not self._is_known(self.store, path)]
            known = self.store.addresses(self.num_voco_tokens)
        todo, self._known = self.processes.broadcast((todo, known))
        return todo[self.processes.rank :: self.processes.number]

    def _is_known(self, store: VoCoStore, path: str) -> bool:
        try:
            stat = os.stat(path)
        except OSError:
            return False  # reading it will say why
        return store.is_known(path, self.num_voco_tokens, self.sampling.of(path), stat.st_size, stat.st_mtime_ns)

    def run(self, files: Sequence[str]) -> Iterator[Indexed]:
        """Compresses what [`Indexer.select`] returned; yields what became of each file as it is done."""
        reader = FileReader(files, self.processor.image_processor, self.sampling)
        for path, content, pixels, error in DataLoader(reader, batch_size=None, num_workers=self.num_workers):
            if content is None:
                yield self._fail(path, error)
            elif (key := (content.content_hash, content.sampling)) in self._known:
                self._repeated.append(content)
                yield Indexed(path)
            elif pixels is None:
                yield self._compress_video(content)
            else:
                self._known.add(key)
                self._images.append((content, pixels))
            if len(self._images) == self.batch_size:
                yield from self._compress_images()
            if sum(len(cache) for _, cache in self._entries) >= self.shard_images:
                self._write()
        yield from self._compress_images()
        self._write()
        self._finish()

    def _fail(self, path: str, error: str) -> Indexed:
        self._failures[path] = error
        return Indexed(path, error=error)

    def _compress_images(self) -> Iterator[Indexed]:
        if not self._images:
            return
        contents, pixels = zip(*self._images)
        self._images = []
        for content, cache in zip(contents, self._compression.compress_images(pixels)):
            self._entries.append((content, cache))
            yield Indexed(content.source, 1, sum(cache.token_counts))

    def _compress_video(self, content: Content) -> Indexed:
        try:
            cache = self._compression.compress_video(content.source)
        except (OSError, ValueError) as error:
            return self._fail(content.source, str(error))
        self._known.add((content.content_hash, content.sampling))
        self._entries.append((content, cache))
        return Indexed(content.source, len(cache), sum(cache.token_counts))

    def _write(self) -> None:
        if not self._entries:
            return
        contents, caches = zip(*self._entries)
        self._entries = []
        if self.store is not None:
            self.store.add(contents, caches)
        else:
            write_shard(self.path / "shards", contents, caches, self._eight_bit)

    def _finish(self) -> None:
        """Into the index what only the other processes know, once all are done."""
        gathered: Iterable = self.processes.gather((self._repeated, self._failures))
        if self.store is not None:
            for repeated, failures in gathered:
                self.store.record(repeated)
                self.store.record_failures(failures)


__all__ = ["Indexed", "Indexer", "Sampling", "find_files"]
