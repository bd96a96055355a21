"""`make gpu`: all stages at a tiny shape, how a stage ends, and the documentation's tables of what was measured."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import record, tables
from benchmarks.gpu.runner import Runner
from benchmarks.gpu.stages import BY_NAME, STAGES, TOTAL_LIMIT, Stage


ROOT = Path(__file__).parents[2]
NAMES = [stage.name for stage in STAGES]


def run(*args):
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    ended = run("--dry-run", "--output", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_at_a_tiny_shape(dry_run, name):
    found = json.loads((dry_run / f"{name}.json").read_text())
    assert found["status"] in ("passed", "skipped"), found
    assert found["dry_run"] and found["command"].startswith("python -m benchmarks.gpu --dry-run")
    assert {"date", "card", "driver", "versions"} <= set(found) and found["versions"]["torch"]
    assert found["parts"] and all(part["status"] in ("passed", "skipped") for part in found["parts"].values())


def test_what_is_done_is_not_run_again(dry_run):
    before = (dry_run / "decoding.json").read_text()
    ended = run("--dry-run", "--stages", "decoding", "--output", dry_run)
    assert ended.returncode == 0 and "in an earlier run" in ended.stdout
    assert (dry_run / "decoding.json").read_text() == before


def test_tables_are_made_of_what_stages_write(dry_run, tmp_path):
    folder = tmp_path / "card"
    folder.mkdir()
    for name in NAMES:
        found = {**json.loads((dry_run / f"{name}.json").read_text()), "card": "A card"}
        record.write(folder / f"{name}.json", found)
    for name, (stage, _) in tables.TABLES.items():
        table = tables.render(name, tmp_path).splitlines()
        assert table[0].startswith("A card, random weights, PyTorch"), (name, table)
        assert len(table) > 4 and len({line.count(" | ") for line in table[2:]}) == 1, (name, stage, table)


def test_all_of_it_fits_into_the_time_that_is_promised():
    assert sum(stage.limit for stage in STAGES) <= TOTAL_LIMIT


@pytest.mark.parametrize("args", [["--stages", "nonsense"], ["--stages", ","], []])
def test_what_cannot_be_run_is_said(args, monkeypatch):
    monkeypatch.setenv("PATH", "")  # where no nvidia-smi is
    ended = run(*args)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert ("--dry-run" if not args else "takes some of") in " ".join(ended.stderr.replace("│", "").split())


TOY = """
import json, os, subprocess, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from benchmarks.gpu import record
head = json.loads({head!r})
parts = record.Parts(Path({path!r}), head, again="--again" in sys.argv)
parts.run("first", lambda: {{"pid": os.getpid()}})
def measure():
    {body}
parts.run("second", measure)
{behind}
parts.run("third", lambda: 3)
"""


class ToyRunner(Runner):
    """Starts a script in place of a stage."""

    body, behind = "return 2", ""

    def command(self, stage: Stage, path: Path) -> list[str]:
        text = TOY.format(
            root=str(ROOT), head=json.dumps(self.head), path=str(path), body=self.body, behind=self.behind
        )
        return [sys.executable, "-c", text]


@pytest.fixture
def runner(tmp_path):
    return ToyRunner(tmp_path, tmp_path / "work", record.about(None, False, "toy"), lambda line: None)


def parts_of(runner) -> dict:
    return record.read(runner.output / "toy.json")["parts"]


def is_running(process: str) -> bool:
    try:
        return "Z (zombie)" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def test_a_stage_is_stopped_with_all_that_it_started_and_a_second_run_goes_on(runner):
    # Much longer than the toy takes to start on a busy machine
    stage = Stage("toy", 20, "")
    runner.body = "child = subprocess.Popen(['sleep', '600']); print('child', child.pid, flush=True); child.wait()"
    outcome = runner.run(stage)
    assert (outcome.status, outcome.reason) == ("failed", "stopped after 20 s in 'second'; a second run goes on there")
    (child,) = re.findall(r"child (\d+)", (runner.output / "toy.log").read_text())
    # A busy machine takes a while to end what was killed
    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(child)
    first = parts_of(runner)["first"]
    runner.body = "return 2"
    assert runner.run(stage).status == "passed"
    assert list(parts_of(runner)) == ["first", "second", "third"] and parts_of(runner)["first"] == first
    assert runner.run(stage).reason == "in an earlier run"


def test_a_part_that_fails_is_named_with_the_first_line_and_tried_again(runner):
    stage = Stage("toy", 100, "")
    runner.body = "raise RuntimeError('no kernel image is available\\nfor this device')"
    outcome = runner.run(stage)
    reason = "second: RuntimeError: no kernel image is available"
    assert (outcome.status, outcome.reason) == ("failed", reason)
    assert parts_of(runner)["third"]["status"] == "passed"
    runner.body = "return 2"
    assert runner.run(stage).status == "passed"


def test_what_is_missing_is_said_and_looked_for_again(runner):
    stage = Stage("toy", 100, "")
    runner.body = "raise record.Missing('flash_attn is not installed')"
    assert runner.run(stage).reason == "without second: flash_attn is not installed"
    runner.body = "return 2"
    assert runner.run(stage).reason == "" and parts_of(runner)["second"]["result"] == 2


def test_a_process_that_dies_is_said(runner):
    runner.body = "print('Bus error', flush=True); os._exit(7)"
    assert runner.run(Stage("toy", 100, "")).reason == "ended with code 7 in 'second': Bus error"


def test_behind_a_lost_device_the_rest_runs_in_another_process(runner):
    runner.body = "raise RuntimeError('illegal memory access')"
    runner.behind = "if '--again' not in sys.argv: sys.exit(3)"
    outcome = runner.run(Stage("toy", 100, ""))
    assert outcome.reason == "second: RuntimeError: illegal memory access"
    assert parts_of(runner)["third"]["status"] == "passed"


@pytest.mark.parametrize("name", ["card", "model", "versions"])
def test_results_of_something_else_are_not_taken_over(runner, name):
    stage = Stage("toy", 100, "")
    assert runner.run(stage).status == "passed"
    runner.head = {**runner.head, name: {"torch": "1.0"} if name == "versions" else "another"}
    outcome = runner.run(stage)
    assert outcome.status == "passed" and outcome.reason == ""


def test_a_file_of_results_is_whole_at_any_time(tmp_path):
    """Whatever a reader meets while parts are written."""
    path = tmp_path / "results.json"
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom benchmarks.gpu.record import Parts, about\n"
        f"parts = Parts(Path({str(path)!r}), about(None, True, 'toy'))\n"
        "for i in range(200): parts.run(str(i), lambda: 'x' * 2000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": ""})
    seen = set()
    while process.poll() is None:
        if path.exists():
            seen.add(len(json.loads(path.read_text())["parts"]))
        time.sleep(0.001)
    assert process.returncode == 0 and len(json.loads(path.read_text())["parts"]) == 200 and len(seen) > 1


def test_pages_have_the_tables_that_the_results_make():
    for page in tables.PAGES.rglob("*.md"):
        text = page.read_text()
        assert tables.update(text) == text, f"{page.name}: run python -m benchmarks.gpu.tables"


def test_what_is_not_measured_names_the_stage_that_would():
    placed = set()
    for page in [ROOT / "README.md", *tables.PAGES.rglob("*.md")]:
        placed |= {name for _, name, _ in tables.BLOCK.findall(page.read_text())}
        for line in page.read_text().splitlines():
            if re.search(r"not (been )?measured", line, re.IGNORECASE):
                (stage,) = re.findall(r"the stage `(\w+)` of", line)
                assert stage in BY_NAME, f"{page.name}: {line}"
    assert placed == set(tables.TABLES)
