"""LLaVA's own data format, a JSON list of conversations and a folder of images and videos, as a `datasets` table."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from .llava_rows import check_row, find_missing, open_row, read_rows


logger = logging.getLogger(__name__)

VERSION = 1  # of the table: another one is made anew
VISION_TOKENS = 576  # what an image is counted as when rows are grouped by length: CLIP ViT-L/14 at 336 px
MODALITIES = ("text", "image", "video")
# TRL's trainer takes columns of other names out, so what belongs to the messages stands among them
FEATURES = Features(
    {
        "messages": {
            "number": Value("int64"),
            "turns": List({"role": Value("string"), "text": Value("string")}),
            "videos": List(Value("string")),
        },
        "images": List(Value("string")),
        "length": Value("int32"),
        "modality": ClassLabel(names=list(MODALITIES)),
        "problem": Value("string"),
    }
)


def load_llava_data(
    path: str | Path,
    image_folder: str | Path | None = None,
    max_bad_rows: int = 100,
    num_frames: int = 8,
    test_size: float | int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Dataset | DatasetDict:
    """
    Turns a file in LLaVA's format into a memory-mapped table, once: it is found again while the file is unchanged. The
    table holds paths; images and videos are read when a row is.

    A row has `conversations`, a list of `{"from": "human" | "gpt", "value": text}`, and where its text says `<image>`
    or `<video>`, as many `image` and `video` paths (one string, or a list). Rows that do not fit, or whose files are
    missing, are reported by their number and left out. Damaged files are found in reading: another row takes the place
    of theirs.

    Args:
        path (`str` or `Path`):
            A `.json` file with a list, or a `.jsonl` file with a row a line.
        image_folder (`str` or `Path`, *optional*):
            Folder the paths of images and videos start from; that of the file by default.
        max_bad_rows (`int`, *optional*, defaults to 100):
            How many rows may be left out, and how many a process may find damaged.
        num_frames (`int`, *optional*, defaults to 8):
            Frames sampled from a video.
        test_size (`float` or `int`, *optional*):
            Share or number of rows to hold out, drawn at random.
        seed (`int`, *optional*, defaults to 0):
            Seed of what is held out.
        cache_dir (`str` or `Path`, *optional*):
            Folder of the table; that of `datasets` by default.

    Returns:
        [`~datasets.Dataset`], or with `test_size` a [`~datasets.DatasetDict`] of `train` and `test`. Rows have the
        columns `messages`, whose video parts hold their frames, and `images`; the table also has `length`, words and
        vision tokens, and `modality`, by which [`VoCoSFTTrainer`] can group rows.

    Raises:
        FileNotFoundError: if the file or the folder does not exist.
        ValueError: if the file is neither a JSON list nor JSON lines, or more than `max_bad_rows` rows cannot be read.
    """
    path = Path(path)
    folder = path.parent if image_folder is None else Path(image_folder)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such image folder: {folder}")
    table = make_table(path, folder, max_bad_rows, num_frames, cache_dir)
    report = Report(path.name, max_bad_rows)
    rows = take_good_rows(table, folder, report)
    reader = RowReader(rows, folder, num_frames, report)
    if test_size is None:
        return rows.with_transform(reader)
    parts = rows.train_test_split(test_size=test_size, seed=seed)
    return DatasetDict({name: part.with_transform(replace(reader, rows=part)) for name, part in parts.items()})


@dataclass
class Report:
    """
    Says which rows are left out, each of them once.

    Args:
        name (`str`): What the rows are called.
        max_bad_rows (`int`): How many there may be.
        is_quiet (`bool`, *optional*, defaults to `False`): Whether to count only.
    """

    name: str
    max_bad_rows: int
    is_quiet: bool = False
    bad_rows: set[int] = field(default_factory=set)

    def __call__(self, number: int, problem: str | Exception) -> None:
        """
        Raises:
            ValueError: if there are more than `max_bad_rows`.
        """
        if number in self.bad_rows:
            return
        self.bad_rows.add(number)
        # Of the processes on a machine one is enough
        if not self.is_quiet and os.environ.get("LOCAL_RANK", "0") == "0":
            logger.warning(f"{self.name}, row {number} is left out: {problem} ({len(self.bad_rows)} so far)")
        if len(self.bad_rows) > self.max_bad_rows:
            raise ValueError(
                f"more than {self.max_bad_rows} rows of {self.name} cannot be read, the last is row {number}: "
                f"{problem}"
            )


def make_table(
    path: Path, folder: Path, max_bad_rows: int, num_frames: int, cache_dir: str | Path | None = None
) -> Dataset:
    """The table of all rows, bad ones too; of several processes one makes it, and the others wait."""
    state = path.stat()
    key = [VERSION, str(path.resolve()), state.st_size, state.st_mtime_ns, str(folder.resolve()), num_frames]
    try:
        table = Dataset.from_generator(
            generate_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            gen_kwargs={"path": path, "folder": folder, "max_bad_rows": max_bad_rows, "num_frames": num_frames},
            fingerprint=hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32],
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise
    return table


def generate_rows(path: Path, folder: Path, max_bad_rows: int, num_frames: int) -> Iterator[dict[str, Any]]:
    """
    Rows of the table.

    Raises:
        ValueError: if more than `max_bad_rows` are bad: nothing is kept of a table that could not be used.
    """
    report = Report(path.name, max_bad_rows, is_quiet=True)
    for number, content in enumerate(read_rows(path), start=1):
        turns: list[dict[str, str]] = []
        paths: dict[str, list[str]] = {"image": [], "video": []}
        try:
            turns, paths = check_row(content)
            problem = find_missing(paths, folder)
        except ValueError as error:
            problem = str(error)
        if problem is not None:
            report(number, problem)
        num_shown = len(paths["image"]) + num_frames * len(paths["video"])
        yield {
            "messages": {"number": number, "turns": turns, "videos": paths["video"]},
            "images": paths["image"],
            "length": sum(len(turn["text"].split()) for turn in turns) + VISION_TOKENS * num_shown,
            "modality": "video" if paths["video"] else "image" if paths["image"] else "text",
            "problem": problem,
        }


def take_good_rows(table: Dataset, folder: Path, report: Report) -> Dataset:
    """
    The table without bad rows. Files that were missing when it was made are looked for again.

    Raises:
        ValueError: if there are too many, or no others.
    """
    is_bad = table.data.column("problem").is_valid().to_numpy()
    for index in is_bad.nonzero()[0].tolist():
        row = table[index]
        paths = {"image": row["images"], "video": row["messages"]["videos"]}
        problem = find_missing(paths, folder) if row["messages"]["turns"] else row["problem"]
        is_bad[index] = problem is not None
        if problem is not None:
            report(row["messages"]["number"], problem)
    if is_bad.all():
        raise ValueError(f"no row of {report.name} can be read")
    if is_bad.any():
        table = table.select((~is_bad).nonzero()[0])
    return table.remove_columns("problem")


@dataclass
class RowReader:
    """
    Opens the files of rows as they are read.

    Args:
        rows (`Dataset`): All rows, of which another one takes the place of one that cannot be read.
        folder (`Path`): Folder the paths of images and videos start from.
        num_frames (`int`): Frames sampled from a video.
        report (`Report`): Told of rows that cannot be read.
    """

    rows: Dataset
    folder: Path
    num_frames: int
    report: Report

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if not {"messages", "images"} <= batch.keys():
            return batch
        read = [self._read(*row) for row in zip(batch["messages"], batch["images"], strict=True)]
        return {"messages": [row[0] for row in read], "images": [row[1] for row in read]}

    def _read(self, messages: dict[str, Any], images: list[str]) -> tuple[list[dict[str, Any]], list[Any]]:
        for step in range(len(self.rows)):
            try:
                paths = {"image": images, "video": messages["videos"]}
                return open_row(messages["turns"], paths, self.folder, self.num_frames)
            except (ValueError, OSError) as error:
                self.report(messages["number"], error)
            # The same one in every process, and after a resume
            row = self.rows[(messages["number"] + step) % len(self.rows)]
            messages, images = row["messages"], row["images"]
        raise ValueError(f"no row of {self.report.name} can be read")


__all__ = ["load_llava_data"]
