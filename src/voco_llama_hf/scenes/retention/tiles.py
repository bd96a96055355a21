"""What tiles buy: large scenes read scaled down, in tiles, and from VoCo tokens of the image or of every tile."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlavaNextImageProcessorPil

from ... import EMBEDDED_CHECKPOINT
from ...files import new_folder
from ...modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..canvas import TILES, Canvas
from ..evaluation import UNCOMPRESSED, ScenesResults, score_readers
from ..phases import load_trained, train_phase
from ..provenance import claim, is_made, made_of
from ..readers import Reader, preprocess, uncompressed_reader, voco_reader
from ..recipe import FROZEN_TOWER, Phase, Recipe
from ..still import make_scenes


LEARNING_RATE = 1e-3
QUESTIONS = 5  # about an image, in a step


@dataclass(frozen=True)
class TileArm:
    """
    One way to read a large image.

    Args:
        name (`str`): What the table calls it.
        num_voco_tokens (`tuple[int, ...]`): Numbers of VoCo tokens to train with and to ask at; 0 reads all vision
            tokens.
        tiled (`bool`): Whether the image is divided into tiles, or else scaled down to one.
        per_tile (`bool`): Whether the numbers are those of every tile.
    """

    name: str
    num_voco_tokens: tuple[int, ...]
    tiled: bool = True
    per_tile: bool = False

    @property
    def folder(self) -> str:
        return f"{self.name}-at-{'-'.join(map(str, self.num_voco_tokens))}".replace(",", "").replace(" ", "-")


def make_arms(k: int, num_tiles: int) -> tuple[TileArm, ...]:
    """
    All arms. An image gets as many VoCo tokens as a tile does, and as many as all tiles together do; tiles are read
    from one number of tokens in all steps of an arm.

    Args:
        k (`int`): VoCo tokens of every tile.
        num_tiles (`int`): Tiles of an image, with the one that shows all of it.
    """
    total = k * num_tiles
    return (
        TileArm("scaled down", (k, total, 0), tiled=False),
        TileArm(f"tiles, {k} for the image", (k,)),
        TileArm(f"tiles, {total} for the image", (total,)),
        TileArm(f"tiles, {k} for every tile", (k,), per_tile=True),
        TileArm("tiles uncompressed", (0,)),
    )


def large_recipe(canvas: Canvas = TILES, **options: int) -> Recipe:
    """The scenes and batches of a [`TileStudy`]."""
    defaults = {"batch_size": 8, "num_workers": 0, "num_validation_scenes": 16, "save_steps": 25}
    return Recipe(phases=(), canvas=canvas, attention="sdpa", dense_share=0.5, **{**defaults, **options})


@dataclass
class TileStudy:
    """
    The arms, trained in a folder or found there.

    Args:
        work_dir (`Path`): Folder of weights and answers; what an interrupted run has left is kept.
        steps (`int`): Optimizer steps of every arm in a round.
        rounds (`int`): How often every arm is trained for so many steps, on new scenes, from where it was left. After
            each all have had the same.
        start (`str`, *optional*): Checkpoint whose weights all arms start from; its images are the tiles.
        recipe ([`Recipe`], *optional*): What is drawn, and how much of it at a time.
    """

    work_dir: Path
    steps: int
    rounds: int = 1
    start: str = EMBEDDED_CHECKPOINT
    recipe: Recipe = field(default_factory=large_recipe)

    @cached_property
    def num_tiles(self) -> int:
        """Tiles of an image, with the one that shows all of it."""
        tile = VoCoLlamaConfig.from_pretrained(self.start).vision_config.image_size  # type: ignore[union-attr]
        return (self.recipe.canvas.side // tile) ** 2 + 1

    def answers(self, arm: TileArm, split: str, limit: int, progress: bool = True) -> ScenesResults:
        """How well an arm answers the questions of a split, measured or read from where it was written."""
        final = self.trained(arm, self.rounds)
        path = final / f"results-{split}-{limit}.json"
        if not path.exists():
            model = load_trained(final)
            processor = VoCoLlamaProcessor.from_pretrained(final)
            scenes = make_scenes(split, limit, canvas=self.recipe.canvas)
            readers = make_readers(arm, model, processor, scenes)
            score_readers(readers, scenes, split, batch_size=64, progress=progress).save(path)
        return ScenesResults(**json.loads(path.read_text()))

    def trained(self, arm: TileArm, rounds: int) -> Path:
        """Folder of an arm after some rounds."""
        if rounds == 0:
            return self._start(arm.tiled)
        recipe, phase = replace(self.recipe, seed=rounds), self._phase(arm, rounds)
        return train_phase(recipe, phase, self.work_dir, False, self.trained(arm, rounds - 1))

    def _phase(self, arm: TileArm, number: int) -> Phase:
        return Phase(
            f"{arm.folder}-{self.steps}-steps-{number}",
            self.steps,
            LEARNING_RATE,
            "cosine",
            arm.num_voco_tokens,
            questions=QUESTIONS,
            describe=True,
            single=True,
            two_stages=0 not in arm.num_voco_tokens,
            per_tile=arm.per_tile,
            freeze=FROZEN_TOWER,
        )

    def _start(self, tiled: bool) -> Path:
        """Folder of what an arm starts from."""
        if not tiled:
            return Path(self.start)
        folder, made = self.work_dir / "start-tiled", made_of(Path(self.start), self.recipe.canvas)
        if not is_made(folder, made):
            model, processor = divide_into_tiles(self.start, self.recipe.canvas)
            self.work_dir.mkdir(parents=True, exist_ok=True)
            with new_folder(folder) as part:
                claim(part, made)
                model.save_pretrained(part)
                processor.save_pretrained(part)
        return folder


def divide_into_tiles(start: str, canvas: Canvas) -> tuple[VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor]:
    """
    The weights of a checkpoint that reads small images, in a model of LLaVA-NeXT's kind whose tiles are as large, and
    its processor: an image of the size of the canvas is divided and not scaled. What ends a row of tiles is at first a
    newline.
    """
    processor = VoCoLlamaProcessor.from_pretrained(start)
    grid = [[canvas.side, canvas.side]]
    config = VoCoLlamaConfig.from_pretrained(start, base_model_type="llava_next", image_grid_pinpoints=grid)
    model = VoCoLlamaForConditionalGeneration.from_pretrained(start, config=config, dtype=torch.float32)
    newline = torch.tensor(processor.tokenizer("\n", add_special_tokens=False).input_ids)
    model.model.image_newline.data = model.get_input_embeddings()(newline)[-1].detach().clone()
    small = processor.image_processor
    processor.image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": small.size["height"]},
        crop_size=dict(small.size),
        image_grid_pinpoints=grid,
        image_mean=small.image_mean,
        image_std=small.image_std,
    )
    return model, processor


def make_readers(
    arm: TileArm, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, scenes: Dataset
) -> dict[str, Reader]:
    """The ways in which an arm is asked."""
    pixels = preprocess(processor, scenes)
    return {
        f"k={k}" if k else UNCOMPRESSED: voco_reader(model, processor, pixels, k, arm.per_tile)
        if k
        else uncompressed_reader(model, processor, pixels)
        for k in arm.num_voco_tokens
    }


def run_tile_study(
    study: TileStudy,
    arms: Sequence[TileArm],
    split: str,
    limit: int,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, ScenesResults]:
    """
    Trains and asks all arms.

    Args:
        study ([`TileStudy`]): Where and how.
        arms (`Sequence[TileArm]`): See [`make_arms`].
        split (`str`): Split to ask about.
        limit (`int`): Number of its scenes.
        report (`Callable`): Told what is done next.
        progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

    Returns:
        `dict[str, ScenesResults]`: results by arm.
    """
    study.work_dir.mkdir(parents=True, exist_ok=True)
    # Round by round, so that an interrupted study has whole tables
    for number in range(1, study.rounds + 1):
        for arm in arms:
            report(f"{arm.name}, round {number} of {study.rounds}")
            study.trained(arm, number)
    return {arm.name: study.answers(arm, split, limit, progress) for arm in arms}
