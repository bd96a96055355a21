"""Adapters and their base model as one model on disk."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.constants import REPOCARD_NAME

from ..loading import load_model, load_processor


# Of what lies beside the adapters, what a card shows
KEPT = ("results.json", "LICENSE*", "*.png", "*.jpg")


@contextmanager
def merged(adapters: Path) -> Iterator[Path]:
    """
    A folder, for a time, of the whole model that adapters and their base model make; the card of the adapters becomes
    that of the model.

    Args:
        adapters (`Path`): Folder of the adapters, in which there is room for the model.

    Raises:
        ValueError: if adapters or base model cannot be loaded.
    """
    model = load_model(str(adapters), merge=True, dtype="auto")
    with tempfile.TemporaryDirectory(dir=adapters, prefix=".merged-") as name:
        folder = Path(name)
        model.save_pretrained(folder)
        load_processor(str(adapters)).save_pretrained(folder)
        for path in (path for pattern in KEPT for path in adapters.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
        if (adapters / REPOCARD_NAME).is_file():
            card = ModelCard.load(adapters / REPOCARD_NAME)
            card.data.library_name, card.data["base_model_relation"] = "transformers", "finetune"
            card.save(folder / REPOCARD_NAME)
        yield folder


__all__ = ["merged"]
