"""The one model that is served, where transformers' serving code asks for it."""

import time
from typing import Any

from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality


class VoCoModelManager(ModelManager):
    """
    A [`~transformers.cli.serving.model_manager.ModelManager`] of one loaded model. Its own looks classes up in
    transformers, where those of remote code are not; and it would load whatever model a request names.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            Model that answers every request.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
        model_id (`str`):
            What clients call it.
    """

    def __init__(self, model: Any, processor: Any, model_id: str):
        self.model, self.processor, self.model_id = model, processor, model_id
        self.created = int(time.time())
        super().__init__()

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return self.model, self.processor

    @staticmethod
    def get_model_modality(model: Any, processor: Any = None) -> Modality:
        return Modality.VLM

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:  # type: ignore[override]
        """What `/v1/models` lists."""
        return [{"id": self.model_id, "object": "model", "created": self.created, "owned_by": "voco-llama-hf"}]


__all__ = ["VoCoModelManager"]
