"""What is left of the objects of a scene: how many of them a description names."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean

from datasets import Dataset

from ..readers import Reader
from ..still import DESCRIBE


OBJECTS = "objects"  # stands beside the families of questions
LONGEST_DESCRIPTION = 60  # tokens
DESCRIBED_AT_A_TIME = 128


def named(said: str, true: str) -> float:
    """
    The share of the objects of a true description that another one names with their size, colour, name and place.
    What it names besides counts as missed.
    """
    objects, claimed = set(true.split(", ")), set(said.split(", "))
    return len(objects & claimed) / max(len(objects), len(claimed))


def name_objects(reader: Reader, scenes: Dataset) -> dict[str, float]:
    """The mean of [`named`] over scenes of each difficulty, from 0 to 1."""
    shares: defaultdict[str, list[float]] = defaultdict(list)
    for start in range(0, len(scenes), DESCRIBED_AT_A_TIME):
        some = list(range(start, min(start + DESCRIBED_AT_A_TIME, len(scenes))))
        batch = scenes.select_columns(["difficulty", "description"])[some]
        said = reader([DESCRIBE] * len(some), some)
        for difficulty, text, true in zip(batch["difficulty"], said, batch["description"], strict=True):
            shares[difficulty].append(named(text, true))
    return {difficulty: mean(values) for difficulty, values in shares.items()}
