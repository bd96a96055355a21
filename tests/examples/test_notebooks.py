"""The notebooks run from the first cell to the last, and what they show is small."""

import json
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SLOW = ("train_your_own",)


def marked(notebook: Path):
    return pytest.param(notebook, id=notebook.stem, marks=[pytest.mark.slow] if notebook.stem in SLOW else [])


@pytest.mark.parametrize("notebook", map(marked, NOTEBOOKS))
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for path in EXAMPLES.glob("scene.*"):
        shutil.copy(path, tmp_path)
    content = nbformat.read(notebook, as_version=4)
    NotebookClient(content, timeout=1800, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_what_it_shows_and_little_else(notebook):
    content = json.loads(notebook.read_text())
    assert content["metadata"].keys() == {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in content["cells"])
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", ()) for output in outputs)
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert notebook.stat().st_size < 150_000
