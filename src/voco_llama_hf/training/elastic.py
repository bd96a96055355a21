"""Elastic training: a batch is collated with the most VoCo tokens an image may have, and cut down at the step."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch.nn.functional import pad


def draw_num_voco_tokens(choices: list[int], seed: int, step: int) -> int:
    """One of `choices`, which depends on seed and step alone: the same on every process, and after a resume."""
    return random.Random(f"{seed}/{step}").choice(choices)


def draw_several(choices: list[int], seed: int, step: int, number: int) -> list[int]:
    """
    What a step reads its images with: `number` different ones of `choices`, the first as [`draw_num_voco_tokens`]
    draws it. A step that reads uncompressed images, for which 0 stands, has no other.
    """
    drawn = [draw_num_voco_tokens(choices, seed, step)]
    others = random.Random(f"{seed}/{step}/others")
    while drawn[0] > 0 and len(drawn) < number:
        drawn.append(others.choice([choice for choice in choices if choice not in (0, *drawn)]))
    return drawn


def repeat_rows(batch: dict[str, Any], numbers: list[int], voco_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """
    All rows of a batch once for each of several numbers of VoCo tokens, as [`keep_voco_tokens`] leaves them, about the
    same images, which `image_indices` say, see [`VoCoLlamaModel.forward`]. `num_draws` says how many times.
    """
    parts = [keep_voco_tokens(batch, number, voco_token_id, pad_token_id) for number in numbers]
    length = max(part["input_ids"].shape[1] for part in parts)
    rows = {
        name: torch.cat([pad(part[name], (0, length - part[name].shape[1]), value=value) for part in parts])
        for name, value in paddings(pad_token_id).items()
        if name in batch
    }
    counts = torch.cat([part["num_voco_tokens"] for part in parts])
    indices = batch.get("image_indices")
    if indices is None:
        indices = torch.arange(len(batch["num_voco_tokens"]), device=counts.device)
    repeated = {"num_voco_tokens": counts, "image_indices": indices.repeat(len(parts)), "num_draws": len(parts)}
    return {**batch, **rows, **repeated}


def first_draw(batch: dict[str, Any], num_draws: int) -> dict[str, Any]:
    """The rows of a batch of [`repeat_rows`] that have the first of its numbers."""
    by_place, by_row = ("num_voco_tokens", "image_indices"), paddings(0)
    repeated = {name: batch[name] for name in (*by_place, *by_row) if name in batch}
    return {**batch, **{name: values[: len(values) // num_draws] for name, values in repeated.items()}}


def paddings(pad_token_id: int) -> dict[str, int]:
    """What stands behind the end of a row, by the name of its tensor."""
    return {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100, "text_groups": 0}


def keep_voco_tokens(
    batch: dict[str, Any], num_voco_tokens: int, voco_token_id: int, pad_token_id: int
) -> dict[str, Any]:
    """
    Takes all but the first `num_voco_tokens` VoCo tokens of every image out of a batch.

    Args:
        batch (`dict[str, torch.Tensor]`):
            Output of the processor: `input_ids`, `attention_mask`, perhaps `labels` and `text_groups`, all
            `(batch_size, sequence_length)`, and `num_voco_tokens`, one number an image. What is a sequence shorter is
            padded on the right.

    Raises:
        ValueError: if an image has fewer VoCo tokens than are to be kept.
    """
    counts = batch["num_voco_tokens"]
    if (counts < num_voco_tokens).any():
        raise ValueError(
            f"the batch was collated with {int(counts.min())} VoCo tokens an image, fewer than the {num_voco_tokens} "
            "of this step: let the data collator make the largest number of num_voco_tokens"
        )
    if (counts == num_voco_tokens).all():
        return batch
    ids = batch["input_ids"]
    is_voco = ids == voco_token_id
    first = counts.cumsum(0) - counts
    place = torch.arange(int(is_voco.sum()), device=ids.device) - first.repeat_interleave(counts)
    dropped = torch.zeros_like(is_voco).masked_scatter(is_voco, place >= num_voco_tokens)
    order = dropped.long().argsort(dim=-1, stable=True)
    moved = {
        name: batch[name].masked_fill(dropped, value).gather(1, order)
        for name, value in paddings(pad_token_id).items()
        if name in batch
    }
    length = int(moved["attention_mask"].any(0).nonzero().max()) + 1
    shorter = {name: values[:, :length] for name, values in moved.items()}
    return {**batch, **shorter, "num_voco_tokens": torch.full_like(counts, num_voco_tokens)}
