"""`voco-llama evaluate --suite lmms`: tasks of lmms-eval at each number of VoCo tokens, and what is made of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from voco_llama_cli import app
from voco_llama_hf import EMBEDDED_CHECKPOINT


pytest.importorskip("lmms_eval.api.model")

COMMAND = ["evaluate", "--suite", "lmms", "scenes", "scenes_choice", "-k", "1", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def evaluated(task_folder, tmp_path_factory):
    """The command, run once."""
    folder = tmp_path_factory.mktemp("evaluated")
    outputs = ["--output", folder / "lmms.json", "--plot", folder / "lmms.png"]
    result = CliRunner().invoke(
        app, list(map(str, [*COMMAND, "--include-path", task_folder, "--work-dir", folder / "run", *outputs]))
    )
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def test_tables_and_files(evaluated, num_choices):
    folder, printed = evaluated
    results = json.loads((folder / "lmms.json").read_text())
    assert results["tasks"]["scenes"]["metric"] == "exact_match"
    assert results["tasks"]["scenes_choice"]["metric"] == "acc"
    assert list(results["readings"]) == ["uncompressed", "k=1", "k=8", "blind"]
    values = {name: one["tasks"]["scenes"]["metrics"]["exact_match"] for name, one in results["readings"].items()}
    assert values["blind"] < values["k=8"] <= 1
    retention = (values["k=1"] - values["blind"]) / (values["uncompressed"] - values["blind"])
    assert results["retention"]["k=1"]["scenes"] == pytest.approx(retention)
    shared = results["readings"]["k=1"]["tasks"]["scenes_choice"]
    assert (shared["images_read"], shared["images_reused"]) == (4, num_choices - 4)
    assert results["readings"]["k=8"]["cost"]["nbytes"] == 8 * results["readings"]["k=1"]["cost"]["nbytes"]
    assert all(word in printed for word in ("mean retention", "keys and values", "FLOPs an image", "12 of scenes"))
    assert Image.open(folder / "lmms.png").width > 500


def test_card_takes_the_results_up(evaluated):
    from voco_llama_hf.hub.results import load_eval_results, results_tables

    figures = load_eval_results(evaluated[0] / "lmms.json")
    assert {figure.metric_type for figure in figures} == {
        "exact_match", "exact_match_shuffled", "acc", "acc_shuffled", "retention",
    }  # fmt: skip
    tables = {table["name"]: table["rows"] for table in results_tables(figures)}
    assert list(tables["scenes"]) == ["uncompressed", "k = 1", "k = 8"]


def test_what_is_there_is_not_asked_again(evaluated, task_folder, tmp_path):
    folder, printed = evaluated
    paths = sorted((folder / "run").rglob("*.json"))
    before = {path: path.stat().st_mtime_ns for path in paths}
    command = [
        *COMMAND,
        "--include-path",
        task_folder,
        "--work-dir",
        folder / "run",
        "--output",
        tmp_path / "again.md",
    ]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in paths} == before
    assert result.stdout == printed
    assert "| k=8 |" in (tmp_path / "again.md").read_text()


def test_a_killed_run_goes_on(task_folder, num_choices, tmp_path):
    """Answers that a killed process wrote are not made again, and the result is that of a run that was not killed."""
    work = tmp_path / "run"
    command = [
        *[sys.executable, "-m", "voco_llama_cli", "evaluate", "--suite", "lmms", "scenes_choice", "-k", "1"],
        *["--include-path", task_folder, "--work-dir", work, "--batch-size", "1", "--device", "cpu"],
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = work / "uncompressed" / "scenes_choice.answers.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and count_lines(log) < 8:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    written = count_lines(log)
    assert 8 <= written < num_choices
    subprocess.run(list(map(str, [*command, "--output", tmp_path / "results.json"])), check=True)
    record = json.loads((work / "uncompressed" / "scenes_choice.json").read_text())
    assert record["images_read"] + record["images_reused"] == num_choices - written
    assert count_lines(log) == num_choices
    assert record["metrics"]["acc"] > 0.6


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_bounds_of_another_model(task_folder, tmp_path):
    """With a model that was trained for it the bounds are those of the paper's Table 1."""
    output = tmp_path / "results.json"
    command = [
        *["evaluate", "--suite", "lmms", "scenes:exact_match", "-k", "2", "--upper-bound", EMBEDDED_CHECKPOINT],
        *["--include-path", task_folder, "--work-dir", tmp_path / "run", "--output", output, "--limit", "4"],
    ]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    assert list(results["readings"]) == ["upper bound", "k=2", "lower bound"]
    from voco_llama_hf.hub.results import load_eval_results

    assert {figure.metric_args["num_voco_tokens"] for figure in load_eval_results(output)} == {2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["sceens"], "lmms-eval has no task 'sceens': did you mean scenes"),
        (["scenes:f1"], "the task scenes has no metric 'f1', it has exact_match"),
        ([], "--suite lmms takes tasks of lmms-eval"),
        (["scenes", "--include-path", "/no/such/folder"], "no such folder of tasks"),
    ],
)
def test_errors(args, message, task_folder, tmp_path):
    options = [] if "--include-path" in args else ["--include-path", str(task_folder)]
    command = ["evaluate", "--suite", "lmms", *args, *options, "--work-dir", str(tmp_path), "-k", "1", "--limit", "2"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 or isinstance(result.exception, SystemExit)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_through_the_server(task_folder, tmp_path):
    """lmms-eval's own client of OpenAI's interface asks `voco-llama serve`."""
    serve = [sys.executable, "-m", "voco_llama_cli", "serve", "--port", "0", "-k", "2", "--device", "cpu"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().split()[-1]
        try:
            arguments = f"model=voco-scenes-tiny,base_url={url},api_key=none"
            command = [sys.executable, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments]
            options = ["--tasks", "scenes", "--include_path", task_folder, "--output_path", tmp_path, "--limit", "4"]
            subprocess.run(list(map(str, [*command, *options])), check=True)
        finally:
            server.terminate()
    (path,) = tmp_path.rglob("*results.json")
    assert json.loads(path.read_text())["results"]["scenes"]["exact_match,none"] > 0.4
