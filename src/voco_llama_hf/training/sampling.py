"""The order of rows, grouped by modality and length as LLaVA's own recipe does."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import TrainerCallback


LENGTH, MODALITY = "length", "modality"
READ_SIZE = 10_000
STEPS_PER_POOL = 50  # as transformers' LengthGroupedSampler


class ModalityLengthSampler(Sampler[int]):
    """
    Draws every row once an epoch, so that those of an optimizer step are of one modality and of about one length. The
    order of an epoch depends on the seed and its number alone: it is the same in every process, and after a resume.

    Args:
        dataset (`Dataset`):
            Rows with the columns `length` and `modality`.
        step_size (`int`):
            Rows of an optimizer step, over all processes.
        seed (`int`):
            Seed of the order.

    Raises:
        ValueError: if `dataset` lacks a column.
    """

    def __init__(self, dataset: Dataset, step_size: int, seed: int):
        missing = {LENGTH, MODALITY} - set(dataset.column_names)
        if missing:
            raise ValueError(
                "group_by_modality_length needs the columns length and modality, which data in LLaVA's format have: "
                f"there is no {' and no '.join(sorted(missing))}"
            )
        # In parts, and of no other column: rows out of order are gathered one by one, with much memory for each
        parts = dataset.select_columns([LENGTH, MODALITY]).with_format("arrow").iter(batch_size=READ_SIZE)
        arrays = [[part[name].to_numpy() for name in (LENGTH, MODALITY)] for part in parts]
        self.lengths, self.modalities = map(np.concatenate, zip(*arrays, strict=True))
        self.step_size, self.seed, self.epoch = step_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng((self.seed, self.epoch))
        steps, left = [], []
        for modality in np.unique(self.modalities):
            rows = rng.permutation((self.modalities == modality).nonzero()[0])
            # Before they are sorted: what is left over must not be the shortest
            rows, rest = np.split(rows, [len(rows) - len(rows) % self.step_size])
            pools = np.arange(len(rows)) // (STEPS_PER_POOL * self.step_size)
            rows = rows[np.lexsort((-self.lengths[rows], pools))]
            steps.append(rows.reshape(-1, self.step_size))
            left.append(rest)
        ordered = rng.permutation(np.concatenate(steps))
        return map(int, np.concatenate([ordered.ravel(), *left]))


class EpochCallback(TrainerCallback):
    """
    Tells the sampler its epoch: transformers tells the loader that skips what was trained before a resume, whose way
    to the sampler ends early where there are several processes.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        train_dataloader.set_epoch(int(state.epoch))


__all__ = ["EpochCallback", "ModalityLengthSampler"]
