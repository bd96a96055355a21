"""Configuration of [`VoCoSFTTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from .precision import is_bfloat16_fast


OWN_TEACHERS = ("self", "adapter")  # readings of the model that is trained


@dataclass
class VoCoSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`VoCoSFTTrainer`]: that of [`~trl.SFTConfig`], whose `bf16` is `False` by default on
    CPUs that are slow at it, and

    Parameters:
        num_voco_tokens (`list[int]`, *optional*):
            Numbers of VoCo tokens of an image, one of which, or `draws_per_step`, is drawn for every optimizer step,
            the same on every process; 0 stands for a step that reads the uncompressed image, and a number that is
            listed twice is drawn twice as often. Evaluation uses the first number, and so do the saved model and
            processor by default. Unset, every step uses `model.config.num_voco_tokens`, or what the processor has for
            every tile.
        num_voco_tokens_per_tile (`list[int]`, *optional*):
            Numbers of VoCo tokens of every tile to draw from, where images are divided into tiles, instead of
            `num_voco_tokens`. Each tile is compressed on its own, so no step reads the uncompressed image, and none is
            distilled from it. The saved processor makes the first of these numbers by default. Not with a data
            collator of one's own.
        two_stages (`bool`, *optional*, defaults to `False`):
            Compress all images of a batch together, and let the text read what is left of them, instead of running
            long sequences with all vision tokens: less work for rows of several images or of many frames. Not with
            gradient checkpointing.
        draws_per_step (`int`, *optional*, defaults to 1):
            Different numbers that are drawn for a step: every image is compressed once, into the most VoCo tokens of
            them, and every row is read with each, for few VoCo tokens are the first of many. Needs `two_stages`. Steps
            that read uncompressed images have no other.
        group_by_modality_length (`bool`, *optional*, defaults to `False`):
            Whether the rows of a step are of one modality and about one length, as in LLaVA's own recipe: less
            padding, and no step waits for a lone image. The data set has columns `length` and `modality`, as that of
            [`load_llava_data`].
        freeze (`list[str]`, *optional*, defaults to `["vision_tower"]`):
            Names of the modules that are not trained, as they stand in the names of the parameters.
        distillation_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the attention distillation (paper, Eq. 5) against the next-token loss:
            `(1 - weight) * nll + weight * temperature**2 * KL(teacher || student)`, both over answer tokens.
        distillation_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both distributions in the divergence.
        teacher (`str`, *optional*, defaults to `"self"`):
            Who reads the uncompressed image: `"self"` is the model as it is at the step, without a gradient;
            `"adapter"` the same model with its PEFT adapters disabled; anything else the folder or Hub id of a
            VoCo-LLaMA or LLaVA model with the same tokenizer.

    Raises:
        ValueError: if a number, weight or temperature is out of its range.
    """

    num_voco_tokens: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of VoCo tokens, draws_per_step of which are drawn for every optimizer step; 0 stands "
            "for a step that reads the uncompressed image. The first is the default of the saved model.",
            "nargs": "+",
        },
    )
    num_voco_tokens_per_tile: list[int] | None = field(
        default=None,
        metadata={"help": "Numbers of VoCo tokens of every tile of an image, instead.", "nargs": "+"},
    )
    two_stages: bool = field(
        default=False,
        metadata={"help": "Compress the images of a batch first, for rows of several images or of many frames."},
    )
    draws_per_step: int = field(
        default=1,
        metadata={"help": "Different numbers that the images of a step, compressed once, are read with (two_stages)."},
    )
    group_by_modality_length: bool = field(
        default=False,
        metadata={"help": "Rows of a step are of one modality and about one length, for data in LLaVA's format."},
    )
    freeze: list[str] = field(
        default_factory=lambda: ["vision_tower"],
        metadata={"help": "Names of the modules that are not trained.", "nargs": "*"},
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the attention distillation against the next-token loss, 0 to 1."}
    )
    distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of teacher and student in the distillation."}
    )
    teacher: str = field(
        default="self",
        metadata={
            "help": "Teacher of the distillation: 'self', 'adapter' (adapters disabled) or the path of a model."
        },
    )

    @property
    def choices(self) -> list[int] | None:
        """What is drawn from for every step: VoCo tokens of an image, or of a tile."""
        return self.num_voco_tokens if self.num_voco_tokens_per_tile is None else self.num_voco_tokens_per_tile

    def __post_init__(self):
        # Without an accelerator there is no other device, but TRL's default of bfloat16 asks for it to be said
        if not torch.accelerator.is_available():
            self.use_cpu = True
            if self.bf16 is None and not self.fp16:
                self.bf16 = is_bfloat16_fast()
        super().__post_init__()
        if isinstance(self.num_voco_tokens, int):
            self.num_voco_tokens = [self.num_voco_tokens]
        if isinstance(self.num_voco_tokens_per_tile, int):
            self.num_voco_tokens_per_tile = [self.num_voco_tokens_per_tile]
        if isinstance(self.freeze, str):
            self.freeze = [self.freeze]
        if self.num_voco_tokens is not None and (not self.num_voco_tokens or min(self.num_voco_tokens) < 0):
            raise ValueError(f"num_voco_tokens takes numbers from 0 on, at least one, got {self.num_voco_tokens}")
        self.check_tiles()
        self._check_draws()
        if self.two_stages and self.gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing needs long sequences: two_stages goes with gradient_checkpointing=False"
            )
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight must lie between 0 and 1, got {self.distillation_weight}")
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature must be above 0, got {self.distillation_temperature}")

    def check_tiles(self) -> None:
        """
        Raises:
            ValueError: if `num_voco_tokens_per_tile` has no numbers, or does not go with the rest.
        """
        if (per_tile := self.num_voco_tokens_per_tile) is None:
            return
        if self.num_voco_tokens is not None:
            raise ValueError("give num_voco_tokens of an image or num_voco_tokens_per_tile, not both")
        if not per_tile or min(per_tile) < 1:
            raise ValueError(f"num_voco_tokens_per_tile takes numbers from 1 on, at least one, got {per_tile}")
        if self.distillation_weight > 0:
            raise ValueError(
                "distillation compares with all of an uncompressed image: it goes with num_voco_tokens, not with "
                "num_voco_tokens_per_tile"
            )

    def _check_draws(self) -> None:
        if self.draws_per_step < 1:
            raise ValueError(f"draws_per_step must be at least 1, got {self.draws_per_step}")
        if self.draws_per_step == 1:
            return
        if not self.two_stages:
            raise ValueError("draws_per_step above 1 needs two_stages, which compress an image once for all draws")
        if (number := len(set(self.choices or []) - {0})) < self.draws_per_step:
            raise ValueError(f"draws_per_step is {self.draws_per_step}, but there are {number} numbers to draw from")


__all__ = ["VoCoSFTConfig"]
