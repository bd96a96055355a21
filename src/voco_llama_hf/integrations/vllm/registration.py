"""What vLLM calls in each of its processes, by the entry point `vllm.general_plugins`."""

from vllm import ModelRegistry
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import TokenizerRegistry

from .limits import bound_memory, check_serving


ARCHITECTURE = "VoCoLlamaForConditionalGeneration"
RENDERER = "voco_llama"


class VoCoLlamaServingConfig(VerifyAndUpdateConfig):
    """What vLLM lets a model decide about its configuration, before anything is built."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        # The renderer of this name is the one that counts `<image>` and refuses `<voco>`; there is no other way here
        model_config.tokenizer_mode = RENDERER

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        check_serving(vllm_config)
        bound_memory(vllm_config)


def register() -> None:
    """Makes the configuration, the model and the renderer known. It may be called many times."""
    import voco_llama_hf  # noqa: F401  # registers the configuration, the processor and their Auto classes

    package = __name__.rpartition(".")[0]
    ModelRegistry.register_model(ARCHITECTURE, f"{package}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = VoCoLlamaServingConfig
    if RENDERER not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(RENDERER, f"{package}.renderer", "VoCoLlamaRenderer")
        TokenizerRegistry.register(RENDERER, "vllm.tokenizers.hf", "CachedHfTokenizer")
