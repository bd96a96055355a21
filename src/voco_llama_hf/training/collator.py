"""From rows to batches: TRL's collator, with what sharded weights and cut answers ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


logger = logging.get_logger(__name__)

PADDING = {"attention_mask": 0, "labels": -100}


@dataclass
class VoCoDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator of images and chats, with what the processor returns: `input_ids`, `attention_mask` and `labels` of
    shape `(batch_size, sequence_length)`, `pixel_values` and `num_voco_tokens`. `<voco>` tokens are never labels,
    since no text is followed by an image that could be told.

    Args:
        always_images (`bool`, *optional*, defaults to `False`):
            Whether a batch without images gets a blank one, behind all text, where nothing reads it. Where weights
            are sharded over processes, all of them must run the same modules.
        kwargs:
            Those of TRL's collator.
    """

    always_images: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self.processor.image_token_id, -100)
        self._check_labels(batch["labels"])
        if self.always_images and "pixel_values" not in batch:
            return self._with_blank_image(batch)
        return batch

    def _check_labels(self, labels: torch.Tensor) -> None:
        num_empty = int((labels == -100).all(-1).sum())
        if num_empty == 0:
            return
        reason = "" if self.max_length is None else f": max_length={self.max_length} may cut off the answers"
        # Once, and in every worker that loads data
        logger.warning_once(f"There are rows from which nothing is learned, {num_empty} of the first batch{reason}")

    def _with_blank_image(self, batch: dict[str, Any]) -> dict[str, Any]:
        image = Image.new("RGB", (32, 32))
        text = self.processor.image_token
        blank = self.processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
        ids = blank.pop("input_ids")
        num_tokens = ids.shape[1]
        # Behind the longest row, which has no padding
        row = int(batch["attention_mask"].sum(-1).argmax())
        longer = {
            name: torch.nn.functional.pad(batch[name], (0, num_tokens), value=value) for name, value in PADDING.items()
        }
        longer["attention_mask"][row, -num_tokens:] = 1
        longer["input_ids"] = torch.nn.functional.pad(
            batch["input_ids"], (0, num_tokens), value=self.processor.tokenizer.pad_token_id
        )
        longer["input_ids"][row, -num_tokens:] = ids[0]
        return {**batch, **blank, **longer}


__all__ = ["VoCoDataCollator"]
