"""Whether one model for every number of VoCo tokens answers worse than a model for one of them.

The embedded checkpoint, which was trained elastically, is trained on from the same weights, on the same scenes and for
as many steps: elastically again, with every number drawn as often or with k = 1 in half of the steps, and with one
number of VoCo tokens alone. What the last gains over the others is what elastic training gives away. About 20 minutes
an arm on two CPU cores; what an interrupted run has left is kept in the work folder.

    python benchmarks/elastic.py --alone 1 --output benchmarks/results/elastic_cpu.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from voco_llama_hf import EMBEDDED_CHECKPOINT
from voco_llama_hf.scenes.retention.report import write_record
from voco_llama_hf.scenes.retention.sizes import Size
from voco_llama_hf.scenes.retention.study import Arm, Study, elastic_arm, fixed_arm
from voco_llama_hf.scenes.still import DIFFICULTIES


KS = (1, 2, 4, 8)
# A number that is named more often is drawn more often
HALF = Arm("elastic, half at k=1", (1, 1, 1, *KS, 0), read_at=KS)


def main(
    alone: Annotated[str, typer.Option(help="Numbers of VoCo tokens to train alone, separated by commas.")] = "1",
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    seed: int = 0,
    limit: Annotated[int, typer.Option(min=1, help="Scenes of the test split to ask about.")] = 600,
    work_dir: Path = Path("runs") / "elastic",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Train on, together and alone, and ask."""
    console = Console(width=100)
    study = Study(work_dir, Size(steps=steps), trained_base=Path(EMBEDDED_CHECKPOINT))
    study.prepare()
    arms = [elastic_arm(KS), HALF, *(fixed_arm(int(k)) for k in alone.split(","))]
    accuracy = {}
    for arm in arms:
        console.rule(arm.name)
        accuracy[arm.name] = study.answers(arm, seed, "test", limit).accuracy
    console.print(make_table(arms, accuracy))
    if output is not None:
        asked = {"split": "test", "num_scenes": limit}
        write_record(output, steps=steps, seed=seed, **asked, arms=arms, accuracy=accuracy)


def make_table(arms: list[Arm], accuracy: dict[str, dict]) -> Table:
    """Exact match in percent."""
    table = Table(title="The embedded checkpoint, trained on: exact match in percent")
    for heading in ("trained on", "asked with", *DIFFICULTIES):
        table.add_column(heading, justify="left" if heading not in DIFFICULTIES else "right")
    for arm in arms:
        for reading, scores in accuracy[arm.name].items():
            table.add_row(
                arm.name, reading, *(f"{100 * scores[difficulty]['all']:.1f}" for difficulty in DIFFICULTIES)
            )
    return table


if __name__ == "__main__":
    typer.run(main)
