"""The tests of the model, on the GPU in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from xml.etree import ElementTree

from .record import Failed, Missing, Parts
from .runner import ROOT
from .setting import Setting, report


TESTS = ROOT / "tests" / "modeling"
# What is about files, text and pixels, and about where accelerate puts weights
NOT_OF_A_DEVICE = (
    "test_hub.py",
    "test_processing.py",
    "test_video.py",
    "test_fingerprint.py",
    "test_llava_contract.py",
)
WORKERS = 6


def run(parts: Parts, setting: Setting) -> None:
    parts.run("tests/modeling", partial(test, setting))


def test(setting: Setting) -> dict[str, object]:
    """
    Numbers of tests that passed, and the names of those that did not.

    Raises:
        Missing: if pytest or the tests are not here, as with an installed wheel.
        Failed: if some fail.
    """
    try:
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
        import xdist  # noqa: F401
    except ImportError as error:
        raise Missing(f"{error.name} is not installed: the extra test brings it") from error
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if path.name not in NOT_OF_A_DEVICE]
    chosen = setting.pick(files, ["tests/modeling/test_cache.py", "-k", "append"])
    found = setting.work_dir / "modeling.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}", *chosen]
    command += setting.pick(["-n", str(WORKERS), "--dist", "loadfile"], [])
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "VOCO_LLAMA_TEST_DEVICE": setting.device})
    if ended.returncode not in (0, 1):
        raise Failed(f"pytest ended with code {ended.returncode}")
    cases = ElementTree.parse(found).getroot().findall(".//testcase")
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    result = {"tests": len(cases), "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad]}
    report(str(result))
    if bad:
        raise Failed(f"{len(bad)} of {len(cases)} tests fail, first {result['failed'][0]}", result)
    return result
