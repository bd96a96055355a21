"""
VoCo-LLaMA in lmms-eval: `lmms-eval --model voco_llama --model_args pretrained=FOLDER,num_voco_tokens=2 --tasks pope`.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "voco_llama"


def manifests() -> list["ModelManifest"]:
    """What lmms-eval finds at the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    # Two names: where one has both classes lmms-eval takes the second, which cannot say how likely an answer is
    return [
        ModelManifest(MODEL_ID, simple_class_path=f"{__name__}.model.VoCoLlama"),
        ModelManifest(f"{MODEL_ID}_chat", chat_class_path=f"{__name__}.model.VoCoLlamaChat"),
    ]


__all__ = ["MODEL_ID", "manifests"]
