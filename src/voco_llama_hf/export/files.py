"""Names of the files of an exported model, and folders that appear only when they are complete."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


COMPRESSOR_FILE, DECODER_FILE = "compressor_model.onnx", "decoder_model.onnx"
FINGERPRINT = "voco_fingerprint"  # metadata of the compressor's graph


def data_file(file: str) -> str:
    """Where the weights of a graph go."""
    return f"{file}.data"


def check_new_folder(folder: Path) -> None:
    """
    Raises:
        FileExistsError: if it is a file or holds something.
        FileNotFoundError: if there is no folder to put it into.
    """
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
    aside = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
    try:
        yield aside
        umask = os.umask(0)
        os.umask(umask)
        aside.chmod(0o777 & ~umask)
        os.replace(aside, folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
