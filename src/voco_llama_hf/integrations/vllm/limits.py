"""What vLLM cannot do with this model, which is refused when it starts, and the memory that compressed images take."""

from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.logger import init_logger

from ...modeling.cache_voco_llama import MAX_VOCO_TOKENS
from ...modeling.configuration_voco_llama import VoCoLlamaConfig, check_text_config, key_value_shape
from ...vision_tokens import count_tile_tokens, count_vision_tokens


if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Those whose layers are known to have a `rotary_emb` and an `attn` that see all keys and values of a token
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
OPTIONS = "voco_llama"  # the name in --additional-config
DEFAULT_CACHE_MB = 1024

logger = init_logger(f"vllm.{__name__}")  # vLLM's own handler shows what is below `vllm`


def read_options(vllm_config: VllmConfig) -> dict[str, Any]:
    """
    `--additional-config '{"voco_llama": {"store": "photos.voco", "image_cache_mb": 1024}}'`.

    Raises:
        ValueError: if there is another option, or one of another type.
    """
    given = vllm_config.additional_config
    options = given.get(OPTIONS, {}) if isinstance(given, dict) else {}
    types = {"store": str, "image_cache_mb": int}
    for name, value in options.items():
        if name not in types or type(value) is not types[name]:
            known = ", ".join(f"{known} ({kind.__name__})" for known, kind in types.items())
            raise ValueError(f"additional_config[{OPTIONS!r}] has {name}={value!r}: {known} are known")
    return options


def check_serving(vllm_config: VllmConfig) -> None:
    """
    Raises:
        ValueError: if vLLM is to be started in a way in which this model would fail, or answer wrongly.
    """
    config = vllm_config.model_config.hf_config
    check_text_config(config.text_config)
    config.validate_image_grid_pinpoints()  # which --hf-overrides does not
    kind = config.text_config.model_type
    if kind not in TEXT_MODELS:
        raise ValueError(f"VoCo-LLaMA runs in vLLM with text models of {', '.join(TEXT_MODELS)}, not {kind}")
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "VoCo-LLaMA cannot run with pipeline parallelism: images are compressed by all layers before the first "
            "one runs. Use --tensor-parallel-size"
        )
    if vllm_config.parallel_config.prefill_context_parallel_size > 1 or vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "VoCo-LLaMA cannot run with prefill context parallelism or dual batch overlap, which divide the tokens of "
            "a step: those of images would be put in at wrong places"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "VoCo-LLaMA cannot run with LoRA adapters in vLLM, which would not be applied to images while they are "
            "compressed: merge them (voco-llama push --merge, or PeftModel.merge_and_unload)"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise ValueError("VoCo-LLaMA cannot run with --enable-prompt-embeds, in which an image would not be seen")
    check_segment(config, count_vision_tokens(config), 1, "the largest image of this model")
    read_options(vllm_config)


def check_segment(config: VoCoLlamaConfig, num_vision_tokens: int, num_voco_tokens: int, what: str) -> None:
    """
    Raises:
        ValueError: if an image has no room in front of its VoCo tokens. vLLM has a table of rotations, and would read
            what lies behind its end.
    """
    room = num_positions(config) - num_fixed_tokens(config) - num_voco_tokens
    if num_vision_tokens > room:
        raise ValueError(
            f"{what} has {num_vision_tokens} vision tokens, but there is room for {room}: the text model has "
            f"{num_positions(config)} positions, for {num_voco_tokens} VoCo tokens as well"
        )


def num_positions(config: VoCoLlamaConfig) -> int:
    """Length of vLLM's table of rotations."""
    text_config: Any = config.text_config  # of whatever class the text model has
    rope = text_config.rope_parameters
    if rope["rope_type"] == "yarn":
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    if rope["rope_type"] == "linear":
        return int(text_config.max_position_embeddings * rope["factor"])
    return text_config.max_position_embeddings


def num_fixed_tokens(config: VoCoLlamaConfig) -> int:
    """Tokens of the segment of every image, beside those of the image."""
    ids: Any = config.vision_prefix_token_ids, config.vision_suffix_token_ids  # lists, once there is a configuration
    return sum(map(len, ids))


def max_segment_length(config: VoCoLlamaConfig, num_tiles: int, num_voco_tokens: int) -> int:
    """Tokens that a segment cannot exceed, with a newline behind each row of patches of each tile."""
    vision: Any = config.vision_config
    per_tile = count_tile_tokens(config) + vision.image_size // vision.patch_size
    return num_tiles * per_tile + num_fixed_tokens(config) + num_voco_tokens


def max_num_voco_tokens(model_config: "ModelConfig") -> int:
    """VoCo tokens that an image may have, all of its tiles together."""
    config = model_config.hf_config
    room = num_positions(config) - num_fixed_tokens(config) - count_vision_tokens(config)
    return min(MAX_VOCO_TOKENS, model_config.max_model_len - 1, room)


def row_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a VoCo token on one rank: keys and values of all layers, and the last hidden state."""
    model_config = vllm_config.model_config
    text_config = model_config.hf_config.text_config
    layers, _, head_dim = key_value_shape(text_config)
    heads = model_config.get_num_kv_heads(vllm_config.parallel_config)
    return (2 * layers * heads * head_dim + text_config.hidden_size) * model_config.dtype.itemsize


def num_rows(vllm_config: VllmConfig) -> int:
    """VoCo tokens that can be among the tokens of one step: all of them are in the encoder cache."""
    scheduler = vllm_config.scheduler_config
    in_cache = max(scheduler.encoder_cache_size, max_num_voco_tokens(vllm_config.model_config))
    return min(in_cache, scheduler.max_num_batched_tokens)


def bound_memory(vllm_config: VllmConfig) -> None:
    """
    Bounds the encoder cache, which vLLM would let grow to as many VoCo tokens as there are tokens in a step, each many
    times larger than an embedding. The buffers they are read from are as large: what is scheduled is in the cache.
    """
    size = row_bytes(vllm_config)
    limit = (read_options(vllm_config).get("image_cache_mb", DEFAULT_CACHE_MB) << 20) // size
    scheduler = vllm_config.scheduler_config
    scheduler.encoder_cache_size = min(scheduler.encoder_cache_size, limit)
    held = max(scheduler.encoder_cache_size, max_num_voco_tokens(vllm_config.model_config))
    logger.info(
        "VoCo-LLaMA: a VoCo token has %.1f KB on each rank. The encoder cache holds %d of them (%.1f MB), the buffers "
        "of a step %d (%.1f MB)",
        size / 1024,
        held,
        held * size / 2**20,
        num_rows(vllm_config),
        num_rows(vllm_config) * size / 2**20,
    )
