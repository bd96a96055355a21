"""What transformers' pipeline does with images that are passed as `images=`: the same as the processor."""

from typing import Any

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline

from .images_voco_llama import load_images


TASK = "image-text-to-text"


class VoCoLlamaPipeline(ImageTextToTextPipeline):
    """
    [`~transformers.ImageTextToTextPipeline`] that leaves transparency and 16-bit greys to this model's images. Of any
    other model it makes transformers' own.
    """

    def __new__(cls, *args: Any, **kwargs: Any):
        model = kwargs.get("model", *args[:1])
        if model is None or model.config.model_type == "voco_llama":  # None: a copy is made
            return super().__new__(cls)
        return ImageTextToTextPipeline(*args, **kwargs)

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, **kwargs):  # type: ignore[override]
        if isinstance(inputs, dict):
            # transformers loads them itself, and takes the transparency off before a processor sees it
            images = load_images(inputs["images"], timeout, upright=True)
            inputs = {**inputs, "images": images}
        return super().preprocess(inputs, timeout, continue_final_message, **kwargs)


def register_pipeline() -> None:
    """
    Makes `pipeline("image-text-to-text")` build a [`VoCoLlamaPipeline`] for a model of this kind. `register_pipeline`
    of the registry would warn, and make every saved pipeline ask for `trust_remote_code`.
    """
    task = PIPELINE_REGISTRY.supported_tasks[TASK]
    if isinstance(task["impl"], str) or task["impl"].__name__ != VoCoLlamaPipeline.__name__:
        PIPELINE_REGISTRY.supported_tasks[TASK] = {**task, "impl": VoCoLlamaPipeline}


__all__ = ["VoCoLlamaPipeline", "register_pipeline"]
