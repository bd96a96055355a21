"""What can be wrong with a store, told apart: damage, a full or failing disk, no permission, another writer."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class DamagedError(ValueError):
    """The index, a shard or an entry is not what was written."""


class NotWritableError(PermissionError):
    """A store that can be read only."""


@contextmanager
def readable_errors(index: Path) -> Iterator[None]:
    """
    Raises what SQLite says under names that say what to do.

    Raises:
        DamagedError: if the index is damaged.
        NotWritableError: if it cannot be written.
        TimeoutError: if another process writes and does not come to an end.
        OSError: if the disk is full or fails.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # of the caller: a store that is closed
    except sqlite3.Error as error:
        # What Python's module raises itself has no code
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        path = os.fspath(index)
        if code == sqlite3.SQLITE_FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path) from error
        if code == sqlite3.SQLITE_IOERR:
            raise OSError(errno.EIO, f"the disk cannot be read or written ({error})", path) from error
        if code == sqlite3.SQLITE_NOMEM:
            raise MemoryError(f"no memory left to read {path}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise TimeoutError(errno.ETIMEDOUT, "another process is writing the store", path) from error
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
            raise NotWritableError(errno.EACCES, f"the store cannot be written ({error})", path) from error
        raise DamagedError(
            f"{path} is damaged ({error}); without it the next voco-llama index makes it anew from the shards"
        ) from error


__all__ = ["DamagedError", "NotWritableError", "readable_errors"]
