"""What it is worth to read the images of an elastic step with several numbers of VoCo tokens instead of one.

The arm "elastic" of `voco-llama evaluate --suite retention`, which draws one of k = 1, 2, 8 and the uncompressed image
for every step, and the same with two of the k in a step, `draws_per_step` of `VoCoSFTConfig`: every image is still
compressed once. Both take as many steps; what a step costs more, `benchmarks/train_step.py` measures. Five minutes a
seed on a CPU core that is fast in bfloat16, once the model is trained that they start from, that of the suite, in
whose folder this goes on; what an interrupted run has left is kept there.

    python benchmarks/draws.py --output benchmarks/results/draws_small_cpu.json
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from voco_llama_hf.benchmark.report import Sheet
from voco_llama_hf.scenes.evaluation import ScenesResults
from voco_llama_hf.scenes.retention.describing import OBJECTS
from voco_llama_hf.scenes.retention.report import percent, write_record
from voco_llama_hf.scenes.retention.sizes import SIZES
from voco_llama_hf.scenes.retention.study import Study, elastic_arm, run_study


KS = (1, 2, 8)
ONE = elastic_arm(KS)
ARMS = (ONE, replace(ONE, name="elastic, 2 k a step", draws=2))


def main(
    size: Annotated[str, typer.Option(help="Key of `SIZES`: the model to start from.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="How often everything is trained.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Scenes of the test split to ask about.")] = 300,
    work_dir: Path = Path("runs") / "retention",
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Train with one and with two numbers a step, and ask."""
    console = Console(width=120)
    study = Study(work_dir, SIZES[size], compile=compile)
    results = run_study(study, ARMS, range(seeds), "test", limit, console.rule)
    make_sheet(results).print(console)
    if output is not None:
        write_record(output, size=size, limit=limit, seeds=seeds, results=results)


def make_sheet(results: dict[str, list[ScenesResults]]) -> Sheet:
    """Objects of dense scenes that are named, and answers about them that are right, in percent, by reading."""
    rows = []
    for arm, by_seed in results.items():
        for reading in by_seed[0].accuracy:
            shares = [[one.accuracy[reading]["dense"][group] for one in by_seed] for group in (OBJECTS, "all")]
            rows.append([arm, reading, *map(percent, shares)])
    headings = ["trained", "asked", "objects, dense", "questions, dense"]
    return Sheet("Numbers of VoCo tokens in a step: percent", headings, rows)


if __name__ == "__main__":
    typer.run(main)
