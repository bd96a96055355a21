import shutil
import tempfile
from pathlib import Path

import pytest
from cli.conftest import images, invoke


__all__ = ["images", "invoke", "quick_folder"]


@pytest.fixture
def quick_folder(tmp_path):
    """In memory, where there is such a place: what is written is synchronized to the disk, thousands of times."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir=memory, prefix="voco-fuzz-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
