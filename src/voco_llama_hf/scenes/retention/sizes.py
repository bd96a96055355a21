"""How large a study is: what is drawn, how large the model is, and how long everything is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..canvas import MINI
from ..recipe import SCENES_64, Phase, Recipe


# A LLaVA of the scenes
BASE = Recipe(phases=SCENES_64.phases[:2])


@dataclass(frozen=True)
class Size:
    """
    Args:
        base ([`Recipe`]): How the model is trained that all arms start from.
        steps (`int`): Optimizer steps of every arm.
        questions (`int`): Questions about an image in a step.
        learning_rates (`tuple[float, ...]`): Peak learning rates that every arm is trained with, with the first seed;
            the one that reads validation best is the arm's.
    """

    base: Recipe = BASE
    steps: int = 1000
    questions: int = 6
    learning_rates: tuple[float, ...] = (1e-3,)


# A few minutes an arm on one CPU core: 16 vision tokens, up to four objects
MINI_SIZE = Size(
    Recipe(
        phases=(
            Phase("description", 250, 3e-3, "constant_with_warmup", (0,), questions=2, describe=True, single=True),
            Phase("uncompressed", 2400, 3e-3, "cosine", (0,), questions=2, describe=True, single=True),
        ),
        canvas=MINI,
        num_train_scenes=20_000,
        num_validation_scenes=64,
        dense_share=0.6,
        batch_size=16,
        vision_steps=800,
        vision_layers=3,
        vision_width=128,
        text_layers=3,
        text_width=128,
        num_workers=0,
        keep_rows=True,
    ),
    steps=600,
    questions=2,
    learning_rates=(2e-3,),
)
# The same scenes, read by a language model of twice the depth, which has been asked three times as much
SMALL_SIZE = replace(
    MINI_SIZE,
    base=replace(
        MINI_SIZE.base,
        phases=(
            MINI_SIZE.base.phases[0],
            Phase("uncompressed", 3000, 2e-3, "cosine", (0,), questions=6, describe=True, single=True),
        ),
        text_layers=6,
    ),
    questions=6,
)
# 64 vision tokens, up to nine objects: hours
SCENES_64_SIZE = Size()
SIZES = {"mini": MINI_SIZE, "small": SMALL_SIZE, "scenes-64": SCENES_64_SIZE}
