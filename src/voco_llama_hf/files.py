"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` when all is written."""
    part = Path(path).with_name(f".{Path(path).name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
