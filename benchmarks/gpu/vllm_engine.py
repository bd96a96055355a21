"""vLLM with the plugin against plain LLaVA: `benchmarks/vllm_serving.py`, in the environment that vLLM is in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

from .record import Failed, Missing, Parts
from .runner import ROOT
from .setting import Setting


SCRIPT = ROOT / "benchmarks" / "vllm_serving.py"
# vLLM wants versions of its own, and so mostly an environment of its own
PYTHON = "VLLM_PYTHON"


def run(parts: Parts, setting: Setting) -> None:
    parts.run("serving", partial(serve, setting))


def serve(setting: Setting) -> dict[str, object]:
    """
    What the script measured.

    Raises:
        Missing: if there is no vLLM, or no script.
        Failed: if it does not run.
    """
    python = os.environ.get(PYTHON, sys.executable)
    if subprocess.run([python, "-c", "import vllm"], capture_output=True).returncode != 0:
        raise Missing(f"no vllm in {python}: {PYTHON} names the python of another environment")
    if not SCRIPT.is_file():
        raise Missing(f"there is no {SCRIPT.relative_to(ROOT)}")
    output = setting.work_dir / "vllm_serving.json"
    output.unlink(missing_ok=True)
    command = [python, str(SCRIPT), "--output", str(output)]
    command += ["--model", setting.model] if setting.model else []
    ended = subprocess.run(command, cwd=ROOT)
    if ended.returncode != 0:
        raise Failed(f"{SCRIPT.name} ended with code {ended.returncode}: see the log")
    return json.loads(output.read_text())
