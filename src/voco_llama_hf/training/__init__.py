"""Training with TRL: how anyone trains a VoCo-LLaMA; needs the `train` extra."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .collator import VoCoDataCollator
    from .sft_config import VoCoSFTConfig
    from .sft_trainer import VoCoSFTTrainer

MODULES = {
    "VoCoDataCollator": "collator",
    "VoCoSFTConfig": "sft_config",
    "VoCoSFTTrainer": "sft_trainer",
}


def __getattr__(name: str) -> Any:
    # TRL takes seconds to import
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)


__all__ = ["VoCoDataCollator", "VoCoSFTConfig", "VoCoSFTTrainer"]
