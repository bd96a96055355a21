import json
import sys

import pytest
from PIL import Image


@pytest.fixture
def benchmark(invoke):
    return lambda *args, **kwargs: invoke("benchmark", *args, **kwargs)


def test_counts_of_a_model_that_fits_nowhere(benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    output, markdown, plot = (tmp_path / f"results.{suffix}" for suffix in ("json", "md", "png"))
    result = benchmark(
        *("--preset", "llava-1.5-7b", "--device", "meta", "-k", "1", "--images", "1,1000"),
        *("--output", output, "--markdown", markdown, "--plot", plot),
    )
    assert result.stderr == ""
    assert "0.524 MB" in result.stdout and "-99.8 %" in result.stdout and "…" not in result.stdout
    results = json.loads(output.read_text())
    costs = results["costs"]["1"]
    assert costs["VoCo cache"]["cache_bytes"] == 2**19
    assert costs["VoCo cache"]["flops"] <= 1.01 * costs["text only"]["flops"]
    assert [point["num_images"] for point in results["many_images_costs"]] == [1, 1000]
    assert results["first_token"] == []
    assert "| VoCo cache | 0.524 MB | -99.8 % |" in markdown.read_text()
    assert Image.open(plot).width > 1000


def test_measures_a_checkpoint(benchmark, checkpoint, tmp_path):
    output = tmp_path / "results.json"
    result = benchmark(
        *("--model", checkpoint, "--device", "cpu", "-k", "2", "--prompt-tokens", 4, "--new-tokens", 3),
        *("--rounds", 1, "--batch-sizes", "1,2", "--images", "3", "--compress-batch-sizes", "2", "--output", output),
    )
    assert "not measured" in result.stdout  # kernels and memory of a GPU
    results = json.loads(output.read_text())
    ways = ["no cache", "full cache", "VoCo cache", "text only"]
    for size in (1, 2):
        records = {r["way"]: r for r in results["first_token"] if r["batch_size"] == size}
        assert sorted(records) == sorted(ways)
        assert all(record["seconds"] > 0 and record["kernel_seconds"] is None for record in records.values())
    assert {record["way"] for record in results["decoding"]} == set(ways[1:])
    assert [record["what"] for record in results["compression"]] == ["bare passes", "compress"]
    assert [(r["way"], r["num_images"]) for r in results["many_images"]] == [("full cache", 3), ("VoCo cache", 3)]
    assert results["versions"]["torch"] and results["hardware"] and results["date"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-k", "0"], "--num-voco-tokens takes numbers from 1 on"),
        (["--images", "some"], "--images takes numbers like 1,2,4"),
        (["--batch-sizes", ""], "--batch-sizes takes numbers from 1 on"),
        (["--preset", "gpt-2"], "'gpt-2' is not one of"),
        (["--preset", "tiny", "--model", "here"], "give --model or --preset, not both"),
        (["--preset", "tiny", "--device", "tpu"], "no device 'tpu' here"),
        (["--plot", "{folder}/a.txt"], "can be drawn as .pdf, .png, .svg only"),
        (["--output", "{folder}/missing/a.json"], "is not a folder"),
    ],
)
def test_errors(benchmark, tmp_path, args, message):
    assert message in benchmark(*[arg.format(folder=tmp_path) for arg in args], exit_code=2).stderr


def test_without_matplotlib(benchmark, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'voco-llama-hf[train]'" in benchmark("--plot", tmp_path / "a.png", exit_code=2).stderr
