"""Adapters and their base model as one model on disk."""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.constants import REPOCARD_NAME

from ..loading import load_model, load_processor


# Of what lies beside the adapters, what a card shows
KEPT = ("results.json", "LICENSE*", "*.png", "*.jpg")


def merge_adapters(adapters: Path, folder: Path) -> None:
    """
    Writes the whole model that adapters and their base model make, with its processor. The card of the adapters, and
    what it shows, becomes that of the model.

    Args:
        adapters (`Path`): Folder of the adapters.
        folder (`Path`): Where to write.

    Raises:
        ValueError: if adapters or base model cannot be loaded.
    """
    load_model(str(adapters), merge=True, dtype="auto").save_pretrained(folder)
    load_processor(str(adapters)).save_pretrained(folder)
    for path in (path for pattern in KEPT for path in adapters.glob(pattern)):
        shutil.copyfile(path, folder / path.name)
    if (adapters / REPOCARD_NAME).is_file():
        card = ModelCard.load(adapters / REPOCARD_NAME)
        card.data.library_name, card.data["base_model_relation"] = "transformers", "finetune"
        card.save(folder / REPOCARD_NAME)


__all__ = ["merge_adapters"]
