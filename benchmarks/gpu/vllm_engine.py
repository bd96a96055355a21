"""vLLM with the plugin against plain LLaVA: `benchmarks/vllm_serving.py`, in the environment that vLLM is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

from .record import Failed, Missing, Parts
from .runner import ROOT
from .setting import Setting, report


SCRIPT = ROOT / "benchmarks" / "vllm_serving.py"
# vLLM wants versions of its own, and so mostly an environment of its own
PYTHON, ENVIRONMENT = "VLLM_PYTHON", ROOT / ".vllm"
# Random weights of a shape that three servers have room for on one card
SHAPE = ("--hidden-size", "2048", "--layers", "16")


def run(parts: Parts, setting: Setting) -> None:
    parts.run("serving", partial(serve, setting))


def serve(setting: Setting) -> dict[str, object]:
    """
    What the script measured.

    Raises:
        Missing: if there is no script, or no vLLM.
        Failed: if it does not run.
    """
    if not SCRIPT.is_file():
        raise Missing(f"there is no {SCRIPT.relative_to(ROOT)}")
    output = setting.work_dir / "vllm_serving.json"
    output.unlink(missing_ok=True)
    command = [find_python(), "-m", f"{__package__}.vllm_on_gpu", "--output", str(output), *SHAPE]
    # Three servers take minutes to start: a dry run sees that the script is there and takes these options
    ended = subprocess.run([*command, *setting.pick([], ["--help"])], cwd=ROOT)
    if ended.returncode != 0:
        raise Failed(f"{SCRIPT.name} ended with code {ended.returncode}: see the log")
    return {} if setting.dry_run else json.loads(output.read_text())


def find_python() -> str:
    """
    The python of an environment that has vLLM.

    Raises:
        Missing: if there is none.
    """
    for python in (os.environ.get(PYTHON), str(ENVIRONMENT / "bin" / "python"), sys.executable):
        if python is None:
            continue
        try:
            tried = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True)
        except OSError:
            continue
        if tried.returncode == 0:
            return python
        report(f"{python}: {tried.stderr.strip().splitlines()[-1:]}")
    raise Missing(f"vllm is not installed, neither here nor in {ENVIRONMENT.name}; {PYTHON} can name another python")
