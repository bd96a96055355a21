"""Configuration, model, processor and cache: the files that a checkpoint on the Hub ships."""

from .compat_voco_llama import VERSION  # noqa: F401


# isort: split
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .cache_voco_llama import VoCoCache
from .configuration_voco_llama import VoCoLlamaConfig
from .modeling_voco_llama import VoCoLlamaForConditionalGeneration, VoCoLlamaModel
from .processing_voco_llama import VoCoLlamaProcessor


AutoConfig.register(VoCoLlamaConfig.model_type, VoCoLlamaConfig)
AutoModel.register(VoCoLlamaConfig, VoCoLlamaModel)
AutoModelForImageTextToText.register(VoCoLlamaConfig, VoCoLlamaForConditionalGeneration)
AutoModelForMultimodalLM.register(VoCoLlamaConfig, VoCoLlamaForConditionalGeneration)
AutoProcessor.register(VoCoLlamaConfig, VoCoLlamaProcessor)

__all__ = ["VoCoCache", "VoCoLlamaConfig", "VoCoLlamaForConditionalGeneration", "VoCoLlamaModel", "VoCoLlamaProcessor"]
