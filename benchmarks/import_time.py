"""Time to import the package against transformers' own LLaVA classes, in fresh processes that take turns.

python benchmarks/import_time.py --output benchmarks/results/import_time.json
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table


STATEMENTS = {
    "transformers": "from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel, LlavaProcessor",
    "voco_llama_hf": "import voco_llama_hf",
    "voco-llama --help": "import sys; sys.argv = ['voco-llama', '--help']; from voco_llama_cli import app; app()",
}


def run(statement: str) -> tuple[float, float]:
    """Seconds that a fresh process takes, by the clock on the wall and of the processor."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor


def main(
    rounds: int = 11,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure imports."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in STATEMENTS}
    for turn in track(range(rounds + 1), description="Alternating"):
        for name, statement in STATEMENTS.items():
            measured = run(statement)
            if turn > 0:  # the first round fills the caches of the file system
                times[name].append(measured)
    medians = {name: [statistics.median(values) for values in zip(*pairs)] for name, pairs in times.items()}
    reference = medians["transformers"]

    table = Table(title="A fresh process")
    for heading in ("", "median", "against transformers", "processor time", "against transformers"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (wall, processor) in medians.items():
        ratios = f"{wall / reference[0]:.3f}x", f"{processor / reference[1]:.3f}x"
        table.add_row(name, f"{1e3 * wall:.0f} ms", ratios[0], f"{1e3 * processor:.0f} ms", ratios[1])
    Console(width=120).print(table)
    if output is not None:
        record = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "rounds": rounds,
            "median_seconds": {name: wall for name, (wall, _) in medians.items()},
            "median_processor_seconds": {name: processor for name, (_, processor) in medians.items()},
        }
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
