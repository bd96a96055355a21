"""
The tests that must pass on every version of transformers, each version in an environment of its own that is kept.

    python tests/matrix.py                  # every minor version that the code names, the newest patch of each
    python tests/matrix.py 5.20 main        # these: a minor version, oldest, newest, or transformers' main branch
    python tests/matrix.py oldest --tests tests/modeling/test_cache.py
    python tests/matrix.py --list           # the versions, as JSON

It stands on the standard library alone, as it runs before anything is installed.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".matrix"
COMPAT = ROOT / "src" / "voco_llama_hf" / "modeling" / "compat_voco_llama.py"
MAIN_BRANCH = "transformers @ git+https://github.com/huggingface/transformers"
# What a checkpoint on the Hub ships, the remote code, conversion, and the commands that need no extra
TESTS = (
    "tests/modeling",
    "tests/conversion",
    *(
        f"tests/cli/test_{name}.py"
        for name in ("ask", "check", "compress", "convert_command", "images", "index_command", "process")
    ),
)


@dataclass
class Outcome:
    """What pytest said in one environment."""

    version: str
    passed: int
    failed: int
    skipped: int
    seconds: float


def known_versions() -> list[str]:
    """Every minor version of transformers from the oldest to the newest that the shipped code names."""
    numbers = dict(re.findall(r"^(OLDEST|NEWEST_TESTED) = \(5, (\d+)\)$", COMPAT.read_text(), re.MULTILINE))
    return [f"5.{minor}" for minor in range(int(numbers["OLDEST"]), int(numbers["NEWEST_TESTED"]) + 1)]


def find_version(name: str) -> str:
    """The version that an argument names."""
    known = known_versions()
    version = {"oldest": known[0], "newest": known[-1]}.get(name, name)
    if version != "main" and not re.fullmatch(r"\d+\.\d+", version):
        raise argparse.ArgumentTypeError(
            f"{name!r}: a version such as {known[0]}, oldest, newest or main was expected"
        )
    return version


def make_environment(version: str) -> Path:
    """The Python of an environment with this version, which is made or brought up to date if it must be."""
    folder = ENVIRONMENTS / version
    python = folder / "bin" / "python"
    torch = os.environ.get("TORCH") or "torch"
    wanted = hashlib.sha256(f"{torch}\n{(ROOT / 'pyproject.toml').read_text()}".encode()).hexdigest()
    stamp = folder / ".installed"
    if version != "main" and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if not python.is_file():
        venv.create(folder, with_pip=True, symlinks=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*install, *torch.split())
    transformers = MAIN_BRANCH if version == "main" else f"transformers=={version}.*"
    run(*install, "--upgrade", transformers, "--editable", f"{ROOT}[test]")
    stamp.write_text(wanted)
    return python


def run(*command: str | Path) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def run_tests(version: str, tests: list[str]) -> Outcome:
    """Runs the tests with one version."""
    print(f"\n=== transformers {version}: environment", flush=True)
    python = make_environment(version)
    found = subprocess.check_output(
        [python, "-c", "from importlib.metadata import version; print(version('transformers'))"], text=True
    ).strip()
    print(f"=== transformers {found}: tests", flush=True)
    report = ENVIRONMENTS / f"{version}.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    command = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "loadscope", f"--junitxml={report}", *tests]
    exit_code = subprocess.run(command, cwd=ROOT).returncode
    seconds = time.monotonic() - start
    if exit_code > 1 or not report.is_file():  # interrupted, or no test was found
        raise SystemExit(f"pytest ended with exit code {exit_code}, on transformers {found}")
    suite = ET.parse(report).getroot()[0].attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    return Outcome(found, int(suite["tests"]) - failed - skipped, failed, skipped, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("versions", nargs="*", type=find_version, metavar="VERSION", help="all by default")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files and folders for pytest")
    parser.add_argument("--list", action="store_true", help="print the versions as JSON and run nothing")
    arguments = parser.parse_args()
    versions = list(dict.fromkeys(arguments.versions)) or known_versions()
    if arguments.list:
        print(json.dumps(versions))
        return
    outcomes = []
    try:
        for version in versions:
            outcomes.append(run_tests(version, arguments.tests))
    finally:
        print("\ntransformers   passed  failed  skipped  seconds")
        for outcome in outcomes:
            numbers = f"{outcome.passed:6}  {outcome.failed:6}  {outcome.skipped:7}  {outcome.seconds:7.0f}"
            print(f"{outcome.version:<14} {numbers}", flush=True)
    sys.exit(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    main()
