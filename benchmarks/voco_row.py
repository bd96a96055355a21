"""Whether it matters what the embedding of `<voco>` is before it is trained.

One VoCo token, learned from three beginnings: the random row that a new token gets, the mean of the embeddings of the
words, and the mean of the vision tokens of some images. Three minutes an arm and seed on a CPU core that is fast in
bfloat16, once the model is trained that they start from, that of `voco-llama evaluate --suite retention`, in whose
folder this goes on. What an interrupted run has left is kept there.

    python benchmarks/voco_row.py --output benchmarks/results/voco_row_small_cpu.json
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from voco_llama_hf import VoCoLlamaForConditionalGeneration
from voco_llama_hf.scenes.building import spoken_texts
from voco_llama_hf.scenes.readers import preprocess
from voco_llama_hf.scenes.retention.report import one_token_sheet, write_record
from voco_llama_hf.scenes.retention.sizes import SIZES
from voco_llama_hf.scenes.retention.study import Arm, Study, fixed_arm, run_study
from voco_llama_hf.scenes.still import make_scenes


RANDOM = fixed_arm(1)
WORDS = replace(RANDOM, name="from the mean of the words")
IMAGES = replace(RANDOM, name="from the mean of vision tokens")
NUM_IMAGES, NUM_TEXTS = 64, 1000


class RowStudy(Study):
    """[`Study`] of arms that begin with different rows."""

    def _untrained(self, arm: Arm, seed: int) -> VoCoLlamaForConditionalGeneration:
        model = super()._untrained(arm, seed)
        beginnings: dict[str, Callable] = {WORDS.name: self._words, IMAGES.name: self._images}
        if arm.name in beginnings:
            with torch.no_grad():
                model.get_input_embeddings().weight[model.config.voco_token_id] = beginnings[arm.name](model)
        return model

    def _words(self, model: VoCoLlamaForConditionalGeneration) -> torch.Tensor:
        texts = islice(spoken_texts(self.base), NUM_TEXTS)
        words = sorted({token for text in texts for token in self.processor.tokenizer(text).input_ids})
        return model.get_input_embeddings().weight[words].mean(0)

    def _images(self, model: VoCoLlamaForConditionalGeneration) -> torch.Tensor:
        scenes = make_scenes("train", NUM_IMAGES, canvas=self.base.canvas)
        return model.model.get_vision_features(**preprocess(self.processor, scenes)).mean((0, 1))


def main(
    size: Annotated[str, typer.Option(help="Key of `SIZES`: the model to start from.")] = "small",
    seeds: Annotated[int, typer.Option(min=1, help="How often everything is trained.")] = 3,
    limit: Annotated[int, typer.Option(min=1, help="Scenes of the test split to ask about.")] = 300,
    work_dir: Path = Path("runs") / "retention",
    compile: Annotated[bool, typer.Option(help="Compile the layers; needs a C++ compiler.")] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Train from each row, and ask."""
    console = Console(width=120)
    study = RowStudy(work_dir, SIZES[size], compile=compile)
    results = run_study(study, (RANDOM, WORDS, IMAGES), range(seeds), "test", limit, console.rule)
    one_token_sheet(f"One VoCo token: percent ({seeds} seeds)", "row", results).print(console)
    if output is not None:
        write_record(output, size=size, limit=limit, seeds=seeds, results=results)


if __name__ == "__main__":
    typer.run(main)
