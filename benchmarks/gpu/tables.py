"""The documentation's tables of what was measured on GPUs, made from the files of results and never typed.

    python -m benchmarks.gpu.tables          # writes them into the pages
    python -m benchmarks.gpu.tables --check  # says which pages are not up to date

A page says where a table goes, between two comments: <!-- gpu: question --> and <!-- /gpu -->.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from voco_llama_hf.benchmark.question import LIMIT, VOCO_CACHE
from voco_llama_hf.files import written_aside

from . import record
from .__main__ import RESULTS
from .runner import ROOT
from .stages import BY_NAME


PAGES = ROOT / "docs" / "source"
BLOCK = re.compile(r"(<!-- gpu: (\w+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)
Rows = list[list[str]]
Parts = dict[str, dict[str, Any]]


def check_rows(parts: Parts) -> Rows:
    """Largest difference by attention and precision."""
    rows = [["", "largest difference, in standard deviations of the logits"]]
    for name, part in parts.items():
        numbers = [value for value in (part.get("result") or {}).values() if isinstance(value, float)]
        rows.append([name, said(part, f"{max(numbers):.1e}" if numbers else "agrees")])
    return rows


def model_tests_rows(parts: Parts) -> Rows:
    rows = [["", "tests", "failed"]]
    for name, part in parts.items():
        result = part.get("result")
        rows.append([name, *([str(result["tests"]), str(len(result["failed"]))] if result else [said(part, ""), ""])])
    return rows


def question_rows(parts: Parts) -> Rows:
    """The paper's Table 7, and what it leaves out."""
    rows = [["", "batch", "kernels", "GPU", "wall", "against no cache", "peak memory"]]
    for part in parts.values():
        if "first_token" not in (part.get("result") or {}):
            continue
        result, records = part["result"], part["result"]["first_token"]
        slowest = next((record["seconds"] for record in records if record["way"] == "no cache"), None)
        for line in records:
            way = f"{line['way']}, k = {result['k']}" if line["way"] in (VOCO_CACHE, LIMIT) else line["way"]
            if line["way"] not in (VOCO_CACHE, LIMIT) and result["k"] != 1:
                continue  # the same for every k
            less = f"-{100 * (1 - line['seconds'] / slowest):.1f} %" if slowest and way != "no cache" else "-"
            times = [milliseconds(line[kind]) for kind in ("kernel_seconds", "event_seconds", "seconds")]
            rows.append([way, str(line["batch_size"]), *times, less, gib(line["peak_bytes"])])
    return rows


def text_only_rows(parts: Parts) -> Rows:
    """The first token of a question about VoCo tokens against that of as much text."""
    rows = [["", "batch", "text only", "VoCo cache", "against text only"]]
    for part in parts.values():
        result = part.get("result") or {}
        if "ratio" in result:
            seconds = result["seconds"]
            rows.append(
                [
                    "static cache" if result["static"] else "dynamic cache",
                    str(result["batch_size"]),
                    *(milliseconds(seconds[way]) for way in (LIMIT, VOCO_CACHE)),
                    f"{result['ratio']:.3f}",
                ]
            )
    return rows


def decoding_rows(parts: Parts) -> Rows:
    rows = [["", "batch", "tokens a second", "a step against reading the weights"]]
    for part in parts.values():
        result = part.get("result") or {}
        for line in result.get("decoding", []):
            speed, reading = line["tokens_per_second"], result["weight_reading"]["seconds"]
            cells = ["lost in noise", "-"]
            if speed is not None:
                cells = [f"{speed:,.1f}", f"{line['batch_size'] / speed / reading:.2f}"]
            kind = "static, compiled" if line["cache"] == "static" else line["cache"]
            rows.append([f"{line['way']}, {kind}", str(line["batch_size"]), *cells])
    return rows


def compression_rows(parts: Parts) -> Rows:
    rows = [["images at a time", "images a second", "against the bare passes"]]
    for part in parts.values():
        records = {line["what"]: line for line in (part.get("result") or {}).get("compression", [])}
        if records:
            ours, bare = records["compress"], records["bare passes"]
            speed = ours["batch_size"] / ours["seconds"]
            rows.append([str(ours["batch_size"]), f"{speed:,.1f}", f"{ours['seconds'] / bare['seconds']:.2f}"])
    return rows


def frames_rows(parts: Parts) -> Rows:
    rows = [["frames held", "of a frame", "milliseconds a frame", "memory at the peak"]]
    for part in parts.values():
        result = part.get("result") or {}
        if "frames_held" in result:
            each = f"{1e3 * result['seconds_a_frame']:.1f}"
            rows.append(
                [
                    f"{result['frames_held']:,}",
                    f"{result['frame_bytes'] / 1e6:.3f} MB",
                    each,
                    gib(result["peak_bytes"]),
                ]
            )
    return rows


def training_rows(parts: Parts) -> Rows:
    rows = [["", "", "time", "against LLaVA", "memory of a step", "against LLaVA"]]
    for name, part in parts.items():
        result = part.get("result") or {}
        seconds, memory = result.get("median_seconds", {}), result.get("peak_bytes", {})
        plain = next(iter(seconds), None)
        for variant in seconds:
            rows.append(
                [
                    variant,
                    name,
                    milliseconds(seconds[variant]),
                    f"{seconds[variant] / seconds[plain]:.2f}",
                    gib(memory[variant]),
                    f"{memory[variant] / memory[plain]:.2f}" if memory[plain] else "-",
                ]
            )
        rows += [
            [variant, name, f"cannot run: {why}", "", "", ""] for variant, why in result.get("cannot_run", {}).items()
        ]
    return rows


def recipes_rows(parts: Parts) -> Rows:
    rows = [["", "rows at a time, of at most", "memory at the peak, of 23.5 GiB", "seconds a step"]]
    for name, part in parts.items():
        result = part.get("result")
        cells = [said(part, ""), "", ""]
        if part["status"] == record.PASSED:
            shape = f"{result['batch_size']}, {result['max_length']:,} tokens"
            cells = [shape, gib(result["peak_bytes"]), f"{result['seconds_a_step']:.2f}"]
        rows.append([name, *cells])
    return rows


def sharding_rows(parts: Parts) -> Rows:
    rows = [["", "loss of the last step", "of a plain training"]]
    for name, part in parts.items():
        result = part.get("result")
        cells = [said(part, ""), ""]
        if part["status"] == record.PASSED:
            cells = [f"{result['losses'][-1]:.4f}", f"{result['plain_losses'][-1]:.4f}"]
        rows.append([name, *cells])
    return rows


def onnx_providers_rows(parts: Parts) -> Rows:
    rows = [["", "batch", "", "ONNX Runtime", "eager by it", "compiled by it"]]
    for name, part in parts.items():
        result = part.get("result") or {}
        for line in result.get("by_batch_size", []):
            for task, seconds in line["seconds"].items():
                own = seconds["onnxruntime"]
                ratios = [
                    f"{seconds[variant] / own:.2f}" if variant in seconds else "-" for variant in ("eager", "compiled")
                ]
                title = f"{name}, {result['preset']}, {result['precision']}"
                rows.append([title, str(line["batch_size"]), task, milliseconds(own), *ratios])
        if part["status"] != record.PASSED:
            rows.append([name, said(part, ""), "", "", "", ""])
    return rows


def any_rows(parts: Parts) -> Rows:
    """How the parts ended, where what they measured has tables of its own."""
    return [["", ""], *([name, said(part, f"measured in {part['seconds']:.0f} s")] for name, part in parts.items())]


# Name of a table, its stage, and what makes its rows, headings first
TABLES: dict[str, tuple[str, Callable[[Parts], Rows]]] = {
    "check": ("check", check_rows),
    "model_tests": ("model_tests", model_tests_rows),
    "question": ("question", question_rows),
    "text_only": ("question", text_only_rows),
    "decoding": ("decoding", decoding_rows),
    "compression": ("compression", compression_rows),
    "frames": ("compression", frames_rows),
    "training": ("training", training_rows),
    "recipes": ("recipes", recipes_rows),
    "sharding": ("sharding", sharding_rows),
    "onnx_providers": ("onnx_providers", onnx_providers_rows),
    "vllm_engine": ("vllm_engine", any_rows),
    "findings": ("findings", any_rows),
}


def said(part: dict[str, Any], passed: str) -> str:
    return passed if part["status"] == record.PASSED else f"{part['status']}: {part['reason']}"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def gib(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**30:.1f} GiB"


def render(name: str, results: Path = RESULTS) -> str:
    """A table for each card on which its stage was run."""
    stage, make_rows = TABLES[name]
    texts = []
    for path in sorted(results.glob(f"*/{stage}.json")):
        found = record.read(path)
        rows = make_rows(found.get("parts", {}))
        if found.get("card") is None or len(rows) == 1:
            continue
        model = found["model"] or "random weights"
        where = f"{found['card']}, {model}, PyTorch {found['versions']['torch']}, {found['date']}"
        lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        cells = [" | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in line) for line in lines]
        texts.append("\n".join([f"{where}:", "", *(f"| {line} |" for line in cells)]))
    return "\n\n".join(texts) or f"Not measured yet: the stage `{stage}` of [`make gpu`](costs.md#on-a-gpu) does."


def update(text: str, results: Path = RESULTS) -> str:
    """A page with its tables made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{render(found[2], results)}\n{found[3]}", text)


def main(check: bool = False) -> None:
    """Write the tables of all pages."""
    assert {stage for stage, _ in TABLES.values()} == set(BY_NAME)
    old = []
    for page in sorted(PAGES.rglob("*.md")):
        text = page.read_text()
        made = update(text)
        if made != text:
            old.append(page.relative_to(ROOT))
            if not check:
                with written_aside(page) as part:
                    part.write_text(made)
    for page in old:
        print(page)
    if check and old:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
