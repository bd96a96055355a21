"""Files of others, which may name nothing outside their folder, and files and folders that are written whole."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .modeling.files_voco_llama import apply_umask, check_replaceable, folder_aside, remove_abandoned, written_aside


def inside(folder: str | os.PathLike, name: object) -> Path:
    """
    The path of a file that something of somebody else names.

    Args:
        folder (`str` or `os.PathLike`):
            Where the file lies.
        name:
            What was read from an index, a database or a message.

    Raises:
        ValueError: if it is anything but the plain name of a file in that folder.
    """
    is_plain = isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\:\0")
    if not is_plain:
        raise ValueError(f"{str(name)[:200]!r} is not the name of a file in {os.fspath(folder)}")
    return Path(folder) / str(name)


def check_inside(folder: Path, path: Path) -> None:
    """
    Looks where links lead. A snapshot in the Hub's cache consists of links to the blobs beside it, which belong to it.

    Raises:
        ValueError: if `path` leads out of `folder`.
    """
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link out of {folder}, to {target}: put a copy in its place")


def check_regular(path: str | os.PathLike) -> os.stat_result:
    """
    Its size and times, without opening it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, a pipe, a socket or a device, which may block who opens it.
    """
    found = os.stat(path)
    if stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{os.fspath(path)} is a folder, not a file")
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{os.fspath(path)} is a pipe, a socket or a device, not a file")
    return found


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """
    Opens a file of somebody else for reading: never a link, and nothing that blocks.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a link, a folder, a pipe, a socket or a device.
    """
    if os.path.islink(path):
        raise ValueError(f"{os.fspath(path)} is a link, not a file")
    check_regular(path)
    if sys.platform == "win32":
        return open(path, "rb")
    # Between look and opening it may have become another
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")


def check_new_folder(folder: Path) -> None:
    """
    Raises:
        FileExistsError: if it is a file or a link, or holds something.
        FileNotFoundError: if there is no folder to put it into.
    """
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a link: give a new or an empty folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} already exists and is not empty: give a new or an empty folder")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a new or an empty folder")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{folder.absolute().parent} is not a folder: {folder.name} cannot be written there")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder aside to write to, renamed to `folder` at the end and removed if something fails."""
    check_new_folder(folder)
    folder = folder.absolute()
    with folder_aside(folder.parent, folder.name) as aside:
        yield aside
        apply_umask(aside)
        os.replace(aside, folder)


__all__ = [
    "check_inside",
    "check_new_folder",
    "check_regular",
    "check_replaceable",
    "inside",
    "new_folder",
    "open_regular",
    "remove_abandoned",
    "written_aside",
]
