"""What is trained, and for how long: the recipes of the checkpoints that read the scenes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .. import EMBEDDED_CHECKPOINT
from .canvas import LARGE, SMALL, Canvas


@dataclass(frozen=True)
class Phase:
    """
    One run of the trainer.

    Args:
        name (`str`): Folder of its checkpoints.
        steps (`int`): Number of optimizer steps.
        learning_rate (`float`): Peak learning rate.
        scheduler (`str`): Learning rate schedule after the warmup.
        decay (`float`): Share of the steps over which `"warmup_stable_decay"` falls.
        num_voco_tokens (`tuple[int, ...]`): Numbers of VoCo tokens to draw from; 0 reads the uncompressed image.
        draws (`int`): Numbers that are drawn for a step, see [`VoCoSFTConfig`]; needs `two_stages`.
        questions (`int`): Number of questions about each image.
        describe (`bool`): Whether a description of the scene ends every conversation: it asks for all that there is
            to see, which a compressed image learns to keep.
        single (`bool`): Whether every question sees the image and itself only.
        videos (`bool`): Whether every other row is a video; needs `single`.
        blinking (`float`): Share of the videos in which every object blinks: of the others every second one has one
            question about blinks, which is little to learn counting from.
        two_stages (`bool`): Whether the images of a batch are compressed together, see [`VoCoSFTConfig`].
        per_tile (`bool`): Whether the numbers of VoCo tokens are those of every tile of an image; needs `single`.
        freeze (`tuple[str, ...]`): Modules that are not trained.
        share (`float`): Share of the weights at its end in what it leaves; the rest are those it started from, which
            keeps more of what they knew (Wortsman et al., 2022, WiSE-FT).
        evaluations (`int`, *optional*): How often the phase is evaluated, at equal distances, the last time at its
            end; by default every 250 steps.
        batch_size (`int`, *optional*): Rows of a step, half as many with videos, by default those of the recipe.
        dense_share (`float`, *optional*): Share of dense scenes, by default that of the recipe.
        seed (`int`, *optional*): Seed of its scenes, those that it is evaluated on too, of their order and of what is
            drawn for a step, by default that of the recipe: phases with the same one see the same scenes again.
    """

    name: str
    steps: int
    learning_rate: float
    scheduler: str
    num_voco_tokens: tuple[int, ...]
    draws: int = 1
    questions: int = 8
    describe: bool = False
    single: bool = False
    videos: bool = False
    blinking: float = 0.0
    two_stages: bool = False
    per_tile: bool = False
    freeze: tuple[str, ...] = ()
    share: float = 1.0
    evaluations: int | None = None
    decay: float = 1 / 3
    batch_size: int | None = None
    dense_share: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Recipe:
    """
    Everything that decides what is trained.

    Args:
        phases (`tuple[Phase, ...]`): What follows the training of the vision tower.
        canvas ([`Canvas`]): Where scenes and videos are drawn.
        start (`str`, *optional*): Checkpoint to start from instead of random weights; its vision tower reads the
            canvas with interpolated positions.
        attention (`str`): Attention implementation. The fused one of torch is slow backwards on a CPU, but long
            sequences need it.
        save_steps (`int`): Steps between two checkpoints of the trainer, at most.
        num_workers (`int`): Processes that draw scenes beside the training.
        dense_share (`float`): Share of dense scenes in the training.
        vision_width (`int`): Hidden size of the vision tower, in heads of 64.
        text_width (`int`): Hidden size of the language model, in four heads.
        keep_rows (`bool`): Whether rows stay in memory once they are drawn, which pays where they are seen again.
    """

    phases: tuple[Phase, ...]
    canvas: Canvas = SMALL
    start: str | None = None
    attention: str = "eager"
    num_train_scenes: int = 300_000
    num_test_clips: int = 600
    num_validation_scenes: int = 300
    num_test_scenes: int = 600
    dense_share: float = 0.3
    batch_size: int = 32
    vision_batch_size: int = 64
    vision_steps: int = 2000
    vision_layers: int = 4
    vision_width: int = 192
    text_layers: int = 6
    text_width: int = 256
    save_steps: int = 250
    num_workers: int = 1
    keep_rows: bool = False
    seed: int = 0

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The numbers of VoCo tokens that the finished model was trained for."""
        return tuple(sorted(set(self.phases[-1].num_voco_tokens) - {0}))

    def for_phase(self, phase: Phase) -> Recipe:
        """The recipe with what a phase has otherwise."""
        return replace(
            self,
            batch_size=self.batch_size if phase.batch_size is None else phase.batch_size,
            dense_share=self.dense_share if phase.dense_share is None else phase.dense_share,
            seed=self.seed if phase.seed is None else phase.seed,
        )


FROZEN_TOWER = ("vision_tower",)

# 64 vision tokens, from random weights: the embedded checkpoint
SCENES_64 = Recipe(
    phases=(
        Phase("description", 400, 2e-3, "constant_with_warmup", (0,), describe=True),
        Phase("uncompressed", 1500, 7e-4, "constant_with_warmup", (0,)),
        Phase("compression", 1250, 1e-3, "constant_with_warmup", (1, 1, 2, 2, 4, 8, 0), describe=True),
        Phase("questions", 2000, 7e-4, "cosine", (1, 1, 2, 2, 4, 8, 0, 0)),
        Phase(
            "voco",
            2700,
            1e-3,
            "warmup_stable_decay",
            (1, 1, 2, 2, 4, 8, 8, 0),
            questions=12,
            describe=True,
            single=True,
        ),
        # The paper's second phase
        Phase(
            "videos",
            2100,
            1e-3,
            "warmup_stable_decay",
            (*[1] * 4, *[2] * 8, 4, 8, 0),
            describe=True,
            single=True,
            videos=True,
            two_stages=True,
            freeze=FROZEN_TOWER,
            share=0.7,
        ),
    )
)

# k = 1 in half of the steps costs the other numbers little: benchmarks/elastic.py
HALF_ONE = (*[1] * 6, 2, 2, 4, 8, 0, 0)
# More steps of half as many rows, most of them with many objects, and with them more VoCo tokens
DENSE = Phase(
    "dense",
    3000,
    1.2e-3,
    "warmup_stable_decay",
    (*[1] * 6, 2, 4, 8, 8, 8, 0),
    questions=12,
    describe=True,
    single=True,
    two_stages=True,
    freeze=FROZEN_TOWER,
    decay=2 / 3,
    batch_size=8,
    dense_share=0.75,
)
# As many again of other scenes, at a rate that falls from the first step on
FALLING = replace(
    DENSE,
    name="linear",
    steps=3100,
    learning_rate=8e-4,
    scheduler="linear",
    decay=Phase.decay,
    dense_share=0.85,
    seed=1,
)
# Others yet, each read with two numbers of VoCo tokens: benchmarks/draws.py
TWO_DRAWS = replace(FALLING, name="two_draws", steps=2250, draws=2, seed=2, share=0.6)
# 576 vision tokens, as the paper's, of images alone: from the embedded checkpoint, whose language model reads VoCo
# tokens already
SCENES_576 = Recipe(
    phases=(
        Phase(
            "uncompressed", 400, 1e-3, "constant_with_warmup", (0,), describe=True, single=True, freeze=FROZEN_TOWER
        ),
        Phase(
            "voco",
            1800,
            1.5e-3,
            "warmup_stable_decay",
            HALF_ONE,
            questions=12,
            describe=True,
            single=True,
            two_stages=True,
            freeze=FROZEN_TOWER,
        ),
        DENSE,
        FALLING,
        TWO_DRAWS,
        # Twice as many images a step
        replace(TWO_DRAWS, name="large_batches", steps=1900, learning_rate=1.1e-3, seed=3, batch_size=16, share=0.6),
    ),
    canvas=LARGE,
    start=EMBEDDED_CHECKPOINT,
    attention="sdpa",
    num_validation_scenes=96,
    num_test_scenes=400,
    dense_share=0.5,
    batch_size=16,
    vision_batch_size=16,
    vision_steps=800,
    save_steps=100,
    num_workers=0,
)
RECIPES = {"scenes-64": SCENES_64, "scenes-576": SCENES_576}
