"""Files and folders that appear whole or not at all; what a killed writer left goes when the next one comes."""

import errno
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


if sys.platform != "win32":
    import fcntl

PATIENCE = 3_600  # seconds after which nobody is writing any more, where folders cannot be locked


@contextmanager
def written_aside(path: str | os.PathLike, group: str | None = None) -> Iterator[Path]:
    """
    A path to write a file to, which takes the place of `path` when all of it is on the disk.

    Args:
        path (`str` or `os.PathLike`):
            File to write, or to replace.
        group (`str`, *optional*):
            Name that several writers share, so that each removes what any of them left; that of the file by default.

    Raises:
        FileExistsError: if there is a link, a device, a pipe or a folder under that name.
        OSError: if it cannot be written.
    """
    path = Path(path)
    check_replaceable(path)
    with folder_aside(path.parent, group or path.name) as aside:
        yield aside / path.name
        _to_disk(aside / path.name)
        os.replace(aside / path.name, path)
    _to_disk(path.parent)


@contextmanager
def folder_aside(parent: Path, name: str) -> Iterator[Path]:
    """
    A new folder in `parent` that is removed at the end, or, if this process is killed, by the next that asks for one
    of that `name`. As long as it is in use it is locked.

    Raises:
        OSError: if it cannot be made, or what is written into it does not reach the disk.
    """
    remove_abandoned(parent, name)
    aside, lock = _locked_folder(parent, name)
    try:
        yield aside
    except SafetensorError as error:
        raise system_error(error, aside) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def remove_abandoned(parent: Path, name: str) -> None:
    """Removes folders of [`folder_aside`] whose writers are gone."""
    pattern = re.compile(rf"\.{re.escape(name)}\.[a-z0-9_]{{8}}\.part")
    with os.scandir(parent) as found:
        abandoned = [Path(entry.path) for entry in found if pattern.fullmatch(entry.name)]
    for folder in abandoned:
        try:
            lock = _lock(folder, wait=False)
            age = time.time() - folder.stat().st_mtime
        except OSError:
            continue  # in use, somebody else's, or gone
        if lock is not None or age > PATIENCE:
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def check_replaceable(path: Path) -> None:
    """
    Raises:
        FileExistsError: if there is anything but a file under that name. A link would be replaced, not written to.
    """
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(mode), "a device, a pipe or a socket")
        raise FileExistsError(f"{path} is {kind}: name the file to write")


def system_error(error: SafetensorError, path: str | os.PathLike) -> Exception:
    """What the system said to safetensors, which passes it on in its text alone; else a ValueError."""
    found = re.search(r"\(os error (\d+)\)|code: (\d+)", str(error))
    if found is None:
        return ValueError(str(error))
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number), os.fspath(path))


def apply_umask(path: str | os.PathLike) -> None:
    """Gives a file or a folder that was made for its owner alone the permissions of any new one."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~umask)


def _locked_folder(parent: Path, name: str) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(suffix=".part", prefix=f".{name}.", dir=parent))
        try:
            return folder, _lock(folder, wait=True)
        except FileNotFoundError:
            continue  # taken for abandoned before it was locked


def _lock(folder: Path, wait: bool) -> int | None:
    """A handle that holds the lock of a folder; None where there are no locks."""
    if sys.platform == "win32":
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(folder)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        return handle
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:
        os.close(handle)
        return None  # some network file systems lock no folders


def _to_disk(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["apply_umask", "check_replaceable", "folder_aside", "remove_abandoned", "system_error", "written_aside"]
