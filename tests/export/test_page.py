"""The page on ONNX: every block stands on its own, whichever a reader starts with."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


PAGE = Path(__file__).parents[2] / "docs" / "source" / "onnx.md"


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
def test_blocks_import_what_they_use(block):
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "-"]
    result = subprocess.run(command, input=block, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
