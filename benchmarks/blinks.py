"""What it takes to count: whether a model that reads images learns how often an object of a video blinks.

Of ordinary videos every second one has one question about it, which is little to learn counting from. Here nine of ten
have nothing but blinking objects, and each is asked about: first with a description of all that a frame shows, then
with the questions alone; last, every second one is ordinary. Half an hour on a CPU core that is fast in bfloat16, once
the model is trained that this starts from, that of `voco-llama evaluate --suite video-retention`, in whose folder it
goes on. What an interrupted run has left is kept there.

    python benchmarks/blinks.py --output benchmarks/results/blinks_small_cpu.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from voco_llama_hf import VoCoLlamaProcessor
from voco_llama_hf.scenes.phases import load_trained, train_phase
from voco_llama_hf.scenes.recipe import FROZEN_TOWER, Phase
from voco_llama_hf.scenes.retention.report import write_record
from voco_llama_hf.scenes.retention.sizes import SIZES
from voco_llama_hf.scenes.retention.videos import VIDEO_QUESTIONS, VideoStudy
from voco_llama_hf.scenes.video_evaluation import evaluate_videos


def phases(k: int, described: int, counted: int, mixed: int) -> tuple[Phase, ...]:
    """What every frame shows, then how often, then everything."""
    common = {
        "learning_rate": 2e-3,
        "scheduler": "cosine",
        "num_voco_tokens": (k,),
        "questions": VIDEO_QUESTIONS,
        "single": True,
        "videos": True,
        "two_stages": True,
        "freeze": FROZEN_TOWER,
        # Eight images and eight videos a step
        "batch_size": 32,
    }
    return (
        Phase(f"described-{described}-k-{k}", described, describe=True, blinking=0.9, **common),
        Phase(f"counted-{counted}-k-{k}", counted, blinking=0.9, **common),
        Phase(f"mixed-{mixed}-k-{k}", mixed, blinking=0.5, **common),
    )


def main(
    k: Annotated[int, typer.Option(min=1, help="VoCo tokens of a frame.")] = 2,
    described: Annotated[int, typer.Option(min=1, help="Steps with descriptions.")] = 1000,
    counted: Annotated[int, typer.Option(min=1, help="Steps with questions alone.")] = 1500,
    mixed: Annotated[int, typer.Option(min=1, help="Steps with as many ordinary videos.")] = 2000,
    limit: Annotated[int, typer.Option(min=1, help="Videos of the test split to ask about.")] = 300,
    size: Annotated[str, typer.Option(help="Key of `SIZES`: the model to start from.")] = "small",
    work_dir: Path = Path("runs") / "video-retention",
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Train on, phase after phase, and ask after each."""
    console = Console(width=100)
    study = VideoStudy(work_dir, SIZES[size], compile=compile)
    console.rule("the model that this starts from")
    study.prepare()
    previous, results = study.start, {}
    for phase in phases(k, described, counted, mixed):
        console.rule(phase.name)
        previous = train_phase(study.base, phase, work_dir, compile, previous)
        model, processor = load_trained(previous), VoCoLlamaProcessor.from_pretrained(previous)
        results[phase.name] = evaluate_videos(model, processor, "test", (k,), limit=limit)
        console.print(results[phase.name].table())
    if output is not None:
        write_record(output, size=size, k=k, results=results)


if __name__ == "__main__":
    typer.run(main)
