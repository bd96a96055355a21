"""
Conversion of checkpoints of the authors' code and of llava-hf into this package's format.

Both hold a Llava: a CLIP vision tower, a two-layer projector and a language model, under different names. What a
VoCo-LLaMA has on top is the `<voco>` token, which the authors' checkpoints bring and llava-hf checkpoints are given.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BaseImageProcessor,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging

from ..files import inside, new_folder
from ..modeling.configuration_voco_llama import VoCoLlamaConfig
from ..modeling.modeling_voco_llama import VoCoLlamaForConditionalGeneration
from ..modeling.processing_voco_llama import VoCoLlamaProcessor


VOCO_TOKEN = "<voco>"
IMAGE_TOKEN = "<image>"
LLAMA_VOCAB_SIZE = 32000
LLAMA_NEWLINE_ID = 13
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

EMBEDDING = "model.language_model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
VISION_TOWER = "model.vision_tower."
AUTHORS_NAMES = {
    r"^model\.vision_tower\.vision_tower\.": VISION_TOWER,
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(?=embed_tokens\.|layers\.|norm\.)": "model.language_model.",
}
# Checkpoints of before transformers 4.52, and those that are still saved in that layout
LLAVA_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^language_model\.model\.": "model.language_model.",
    r"^(?=vision_tower\.|multi_modal_projector\.)": "model.",
}

PROBLEMS = {"missing_keys": "missing", "unexpected_keys": "unknown"}

# The prompt the authors train on: the image first, then the system prompt and the turns of Vicuna v1
AUTHORS_CHAT_TEMPLATE = """\
{%- for message in messages if message['content'] is not string -%}
    {%- for part in message['content'] if part['type'] in ('image', 'video') -%}
        {{ '<' + part['type'] + '>\\n' }}
    {%- endfor -%}
{%- endfor -%}
{%- if messages[0]['role'] != 'system' -%}
    {{ 'A chat between a curious user and an artificial intelligence assistant of the image. ' }}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set text = message['content'] -%}
    {%- else -%}
        {%- set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join -%}
    {%- endif -%}
    {%- if message['role'] == 'system' -%}
        {{ text + ' ' }}
    {%- elif message['role'] == 'user' -%}
        {{ 'USER: ' + text + ' ' }}
    {%- else -%}
        {{ 'ASSISTANT: ' }}{%- generation -%}{{ text + '</s>' }}{%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ 'ASSISTANT:' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class ConversionReport:
    """
    What [`convert_checkpoint`] did.

    Args:
        source, target (`Path`):
            The checkpoint read and the checkpoint written.
        source_format (`str`):
            `"llava_llama"` (the authors' format) or `"llava"` (llava-hf).
        text_model (`str`):
            Model type of the language model.
        vision_tower (`str`):
            Where the weights and the configuration of the vision tower came from.
        voco_token_id, voco_token_origin (`int` and `str`):
            Id of `<voco>`, and where it came from.
        num_voco_tokens (`int`):
            VoCo tokens an image is compressed into when a call does not say.
        vision_prefix_token_ids, vision_suffix_token_ids (`list[int]`):
            Ids around the vision tokens of every image.
        dtype, num_parameters (`str` and `int`):
            Data type and number of the weights written.
        processor_written (`bool`):
            Whether a [`VoCoLlamaProcessor`] was written too.
        warnings (`list[str]`):
            What the user should look at.
    """

    source: Path
    target: Path
    source_format: str
    text_model: str
    vision_tower: str
    voco_token_id: int
    voco_token_origin: str
    num_voco_tokens: int
    vision_prefix_token_ids: list[int]
    vision_suffix_token_ids: list[int]
    dtype: str
    num_parameters: int
    processor_written: bool
    warnings: list[str]


@dataclass
class _Checkpoint:
    """What a source holds, under this package's names, and what a converter notices on the way."""

    source: Path
    source_format: str
    tokenizer_config: PreTrainedConfig
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig
    llava_arguments: dict[str, Any]
    state_dict: dict[str, torch.Tensor]
    vision_tower: str
    image_processor_sources: list[str | Path]
    has_voco_token: bool
    pad_to_square: bool = False
    chat_template: str | None = None
    warnings: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vision_tower: str | Path | None = None,
    vision_prefix_token_ids: list[int] | None = None,
    vision_suffix_token_ids: list[int] | None = None,
    num_voco_tokens: int | None = None,
    dtype: str | torch.dtype | None = None,
) -> ConversionReport:
    """
    Converts a checkpoint of the authors' code (`model_type: llava_llama`) or of llava-hf (`model_type: llava`) into a
    folder for [`VoCoLlamaForConditionalGeneration.from_pretrained`].

    The `<voco>` of an authors' checkpoint is that of its tokenizer, or the row added to the 32000 of Llama. A llava-hf
    checkpoint is given one: the next free row of a padded vocabulary, else one row more. (Which rows are free only the
    tokenizer knows; without one a row is added.) Embedding and `lm_head` of that row become the mean of the rows below
    it. Its logit is therefore the mean of the others and never the largest, so that an untrained `<voco>` is not
    generated; all other logits are unchanged. A `<voco>` which such a checkpoint has already keeps its row as it is.

    Weights are memory-mapped and take memory only where they change. `target` appears at once and complete; whatever
    goes wrong, it is left as it was.

    Args:
        source (`str` or `Path`):
            Folder of the checkpoint: `config.json` and weights, `.safetensors` or `.bin`, in one file or sharded.
        target (`str` or `Path`):
            Folder to write. It must be new or empty.
        tokenizer (`str` or `Path`, *optional*):
            Folder or hub id of the tokenizer. Defaults to that of `source`. Without any no processor is written.
        vision_tower (`str` or `Path`, *optional*):
            Folder or hub id of the CLIP model that is the vision tower. An authors' checkpoint takes its configuration
            and its image processor from here (default: the hub id it names), and its weights if it has none itself. A
            llava-hf checkpoint has both itself and only takes its image processor from here.
        vision_prefix_token_ids (`list[int]`, *optional*):
            Ids in front of the vision tokens. Defaults to the BOS token, if there is one.
        vision_suffix_token_ids (`list[int]`, *optional*):
            Ids between vision tokens and VoCo tokens. Defaults to the newline, as the tokenizer encodes it in front of
            `<voco>`; without a tokenizer to 13, Llama's.
        num_voco_tokens (`int`, *optional*):
            VoCo tokens an image is compressed into when a call does not say. Defaults to that of [`VoCoLlamaConfig`].
        dtype (`str` or `torch.dtype`, *optional*):
            `"float32"`, `"float16"` or `"bfloat16"`. Defaults to that of the language model in `source`.

    Returns:
        [`ConversionReport`]: what was recognised and what was written.

    Raises:
        FileNotFoundError: if `source`, its `config.json` or one of its weight files does not exist.
        ValueError: if the checkpoint is of another format, is damaged or incomplete or does not fit its configuration,
            if tokenizer or vision tower cannot be loaded or do not fit it, or if `target` cannot be written to.

    Example:

    ```python
    >>> from voco_llama_hf.conversion.convert import convert_checkpoint

    >>> report = convert_checkpoint("llava-1.5-7b-hf", "voco-llava-1.5-7b", num_voco_tokens=2)
    >>> report.voco_token_id, report.voco_token_origin
    (32002, 'a free row of the padded vocabulary')
    ```"""
    source, target = _check_folders(Path(source), Path(target))
    torch_dtype = _check_dtype(dtype)
    checkpoint = _read_checkpoint(source, vision_tower)
    text_tokenizer = _load_tokenizer(checkpoint, tokenizer)
    place_voco_token = _find_voco_token if checkpoint.has_voco_token else _make_voco_token
    voco_token_id, voco_token_origin = place_voco_token(checkpoint, text_tokenizer)
    prefix, suffix = vision_prefix_token_ids, vision_suffix_token_ids
    if prefix is None:
        prefix = _vision_prefix(checkpoint, text_tokenizer)
    if suffix is None:
        suffix = _vision_suffix(checkpoint, text_tokenizer, voco_token_id)

    config = _build_config(checkpoint, voco_token_id, prefix, suffix, num_voco_tokens)
    model = _build_model(checkpoint, config, torch_dtype)
    processor = _build_processor(checkpoint, text_tokenizer, config.num_voco_tokens)
    # Without an image processor there is no processor, but the tokenizer that knows <voco> is still worth keeping
    _write(target, model, processor or text_tokenizer)
    return ConversionReport(
        source=source,
        target=target,
        source_format=checkpoint.source_format,
        text_model=checkpoint.text_config.model_type,
        vision_tower=checkpoint.vision_tower,
        voco_token_id=voco_token_id,
        voco_token_origin=voco_token_origin,
        num_voco_tokens=config.num_voco_tokens,
        vision_prefix_token_ids=prefix,
        vision_suffix_token_ids=suffix,
        dtype=str(model.dtype).removeprefix("torch."),
        num_parameters=model.num_parameters(),
        processor_written=processor is not None,
        warnings=checkpoint.warnings,
    )


def _check_folders(source: Path, target: Path) -> tuple[Path, Path]:
    """Both paths, resolved. Raises unless `source` is a checkpoint folder and `target` can become one."""
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist; the source is a local folder (`hf download` fetches one from the Hub)"
        )
    if not source.is_dir():
        raise ValueError(f"{source} is a file; the source is a folder with {CONFIG_NAME} and weights")
    if target.is_symlink():
        raise ValueError(f"{target} is a link; the target must be a new or an empty folder")
    source, target = source.resolve(), target.resolve()
    if target == source:
        raise ValueError(f"source and target are the same folder, {source}; the target must be another one")
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} already exists and is not empty; the target must be a new or an empty folder")
    ancestor = next(folder for folder in (target, *target.parents) if folder.exists())
    if not ancestor.is_dir():
        raise ValueError(f"{target} cannot be written: {ancestor} is a file, not a folder")
    return source, target


def _check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The `torch.dtype` of a data type or of its name."""
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and torch_dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return torch_dtype


@contextmanager
def _as_value_error(message: str) -> Iterator[None]:
    """Turns what transformers raises for unusable files and settings into a ValueError that starts with `message`."""
    try:
        yield
    except Exception as error:  # a bare Exception is what the tokenizers library raises
        raise ValueError(f"{message}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    with _as_value_error(f"{path} is not a JSON file"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; an object was expected")
    return content


def _read_checkpoint(source: Path, vision_tower: str | Path | None) -> _Checkpoint:
    """Reads the configuration and maps the weights of a checkpoint in one of the formats known."""
    if not (source / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{source} has no {CONFIG_NAME}; a checkpoint folder with {CONFIG_NAME} was expected")
    config = _read_json(source / CONFIG_NAME)
    model_type = config.get("model_type")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{source} is quantized; a checkpoint with float weights was expected")
    if model_type == VoCoLlamaConfig.model_type:
        raise ValueError(f"{source} already is a {model_type} checkpoint; there is nothing to convert")
    if model_type == "llava" and "text_config" not in config:
        raise ValueError(
            f"{source} is a llava checkpoint of the original layout, without text_config; "
            "a llava-hf checkpoint or a VoCo-LLaMA of the authors' code (model_type llava_llama) was expected"
        )
    if model_type not in ("llava", "llava_llama"):
        raise ValueError(
            f"{source / CONFIG_NAME} has model_type {model_type!r}; "
            "'llava_llama' (the authors' format) or 'llava' (llava-hf) was expected"
        )
    read = _read_llava_checkpoint if model_type == "llava" else _read_authors_checkpoint
    checkpoint = read(source, config, vision_tower)
    _check_embedding(checkpoint)
    return checkpoint


def _check_embedding(checkpoint: _Checkpoint) -> None:
    """Raises unless there is one float embedding for every token of the vocabulary."""
    embedding = checkpoint.state_dict.get(EMBEDDING)
    if embedding is None:
        raise ValueError(f"{checkpoint.source} has no token embeddings; {EMBEDDING} was expected among its weights")
    if not embedding.is_floating_point():
        raise ValueError(f"{checkpoint.source} holds {embedding.dtype} weights; float weights were expected")
    if embedding.shape[0] != checkpoint.text_config.vocab_size:
        raise ValueError(
            f"{checkpoint.source} has {embedding.shape[0]} token embeddings; "
            f"{checkpoint.text_config.vocab_size} were expected (vocab_size of {CONFIG_NAME})"
        )


def _read_authors_checkpoint(source: Path, config: dict[str, Any], vision_tower: str | Path | None) -> _Checkpoint:
    """The layout of the original LLaVA, which the authors' code writes."""
    activation = _choose(config, "mm_projector_type", {"mlp2x_gelu": "gelu"})
    select_strategy = _choose(config, "mm_vision_select_feature", {"patch": "default", "cls_patch": "full"}, "patch")
    pad_to_square = _choose(config, "image_aspect_ratio", {None: False, "square": False, "pad": True})
    _choose(config, "mm_use_im_start_end", {False: False}, False)
    feature_layer = config.get("mm_vision_select_layer")
    if not isinstance(feature_layer, int):
        raise ValueError(f"{CONFIG_NAME} has mm_vision_select_layer {feature_layer!r}; an integer was expected")
    text_config = _llama_config(source, config)
    tower = vision_tower or config.get("mm_vision_tower")
    if tower is None:
        raise ValueError(f"{source} does not name its vision tower (mm_vision_tower): pass vision_tower")
    vision_config = _load_clip_config(tower)
    state_dict = _rename(_read_weights(source), AUTHORS_NAMES)
    weights_from: str | Path = source
    if not any(name.startswith(VISION_TOWER) for name in state_dict):
        state_dict |= _load_clip_weights(tower, vision_config)
        weights_from = tower
    sizes = vision_config.to_dict()
    return _Checkpoint(
        source=source,
        source_format=config["model_type"],
        tokenizer_config=text_config,
        text_config=text_config,
        vision_config=vision_config,
        llava_arguments={
            "vision_feature_layer": feature_layer,
            "vision_feature_select_strategy": select_strategy,
            "projector_hidden_act": activation,
            "multimodal_projector_bias": True,
            "image_seq_length": (sizes["image_size"] // sizes["patch_size"]) ** 2 + (select_strategy == "full"),
            "tie_word_embeddings": text_config.tie_word_embeddings,
        },
        state_dict=state_dict,
        vision_tower=f"weights from {weights_from}, configuration from {tower}",
        image_processor_sources=[tower, source],
        has_voco_token=True,
        pad_to_square=pad_to_square,
        chat_template=AUTHORS_CHAT_TEMPLATE,
    )


def _llama_config(source: Path, config: dict[str, Any]) -> LlamaConfig:
    """The language model of an authors' checkpoint, whose fields keep their names."""
    names = {f.name for f in fields(LlamaConfig)} - {f.name for f in fields(PreTrainedConfig)}
    names |= {"rope_theta", "rope_scaling"}
    with _as_value_error(f"{source / CONFIG_NAME} does not describe a Llama"):
        return LlamaConfig(**{name: value for name, value in config.items() if name in names})


def _read_llava_checkpoint(source: Path, config: dict[str, Any], vision_tower: str | Path | None) -> _Checkpoint:
    """The layout of transformers' `LlavaForConditionalGeneration`, old and new."""
    with _as_value_error(f"{source / CONFIG_NAME} does not describe a Llava"):
        llava = LlavaConfig.from_dict(config)
    return _Checkpoint(
        source=source,
        source_format=llava.model_type,
        tokenizer_config=llava,
        text_config=cast(PreTrainedConfig, llava.text_config),
        vision_config=cast(PreTrainedConfig, llava.vision_config),
        llava_arguments={
            "vision_feature_layer": llava.vision_feature_layer,
            "vision_feature_select_strategy": llava.vision_feature_select_strategy,
            "projector_hidden_act": llava.projector_hidden_act,
            "multimodal_projector_bias": llava.multimodal_projector_bias,
            "image_seq_length": llava.image_seq_length,
            "tie_word_embeddings": llava.tie_word_embeddings,
        },
        state_dict=_rename(_read_weights(source), LLAVA_NAMES),
        vision_tower=f"weights and configuration from {source}",
        image_processor_sources=[vision_tower or source],
        has_voco_token=False,
    )


def _choose(config: dict[str, Any], name: str, meanings: dict[Any, Any], default: Any = None) -> Any:
    """What the value of a field means, if it is one of the values known."""
    value = config.get(name, default)
    for known, meaning in meanings.items():
        if value == known:
            return meaning
    expected = " or ".join(repr(known) for known in meanings)
    raise ValueError(f"{CONFIG_NAME} has {name} {value!r}; {expected} was expected")


def _weight_files(source: Path) -> list[Path]:
    """The weight files of a checkpoint folder; safetensors before `.bin`, as transformers prefers them."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index = source / f"{name}.index.json"
        if (source / name).is_file():
            return [source / name]
        if index.is_file():
            with _as_value_error(f"{index} does not map weights to shards"):
                shards = [inside(source, shard) for shard in sorted(set(_read_json(index)["weight_map"].values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, named by {index.name}")
            return shards
    found = ", ".join(sorted(path.name for path in source.iterdir()))
    hint = "; it looks like a LoRA adapter: merge it into its base model first" if "adapter_" in found else ""
    raise FileNotFoundError(
        f"{source} has no weights; {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or shards with an index, "
        f"were expected among {found}{hint}"
    )


def _read_weights(source: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint folder, memory-mapped; `.bin` files are read with `weights_only=True`."""
    state_dict: dict[str, torch.Tensor] = {}
    for file in logging.tqdm(_weight_files(source), desc="Reading weight files"):
        with _as_value_error(f"{file} is damaged or is not a file of weights"):
            tensors = load_state_dict(file)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise ValueError(f"{file} does not hold a state dict; a dictionary of tensors was expected")
        state_dict |= tensors
    return state_dict


def _rename(state_dict: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A state dict under this package's names."""
    renamed = {}
    for name, tensor in state_dict.items():
        pattern = next((pattern for pattern in names if re.search(pattern, name)), None)
        renamed[name if pattern is None else re.sub(pattern, names[pattern], name)] = tensor
    return renamed


def _load_clip_config(tower: str | Path) -> CLIPVisionConfig:
    """
    The configuration of a vision tower. The shapes of its weights do not tell it: they show neither the number of
    attention heads nor the activation.
    """
    with _as_value_error(
        f"the configuration of the vision tower {tower} cannot be loaded; "
        "pass vision_tower, the folder or hub id of the CLIP model"
    ):
        config = AutoConfig.from_pretrained(tower, trust_remote_code=False)
    if isinstance(config, CLIPConfig):
        config = config.vision_config
    if not isinstance(config, CLIPVisionConfig):
        raise ValueError(f"the vision tower {tower} is of type {config.model_type!r}; a CLIP model was expected")
    return config


def _load_clip_weights(tower: str | Path, config: CLIPVisionConfig) -> dict[str, torch.Tensor]:
    """The weights of a vision tower that the checkpoint does not hold."""
    with _quiet(), _as_value_error(f"the vision tower {tower} cannot be loaded; pass vision_tower"):
        loaded: Any = CLIPVisionModel.from_pretrained(tower, config=config, output_loading_info=True)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"the vision tower {tower} lacks {_some(info['missing_keys'])}")
    return {VISION_TOWER + name: tensor for name, tensor in model.state_dict().items()}


def _load_tokenizer(checkpoint: _Checkpoint, tokenizer: str | Path | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer given, else that of the checkpoint, else none."""
    with _as_value_error(
        f"the tokenizer of {tokenizer or checkpoint.source} cannot be loaded "
        "(a tokenizer.model takes the packages sentencepiece and protobuf)"
    ):
        if tokenizer is not None:
            return AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
        if any((checkpoint.source / name).is_file() for name in TOKENIZER_FILES):
            # transformers does not know the model type llava_llama, and would warn of it
            config = checkpoint.tokenizer_config
            return AutoTokenizer.from_pretrained(checkpoint.source, config=config, trust_remote_code=False)
    return None


def _add_voco_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of `<voco>` in a tokenizer, which has it as a special token afterwards."""
    tokenizer.add_tokens(AddedToken(VOCO_TOKEN, special=True, normalized=False))
    return tokenizer.get_vocab()[VOCO_TOKEN]


def _find_voco_token(checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, str]:
    """The id of the `<voco>` that a checkpoint was trained with, and where it came from."""
    vocab_size = checkpoint.text_config.vocab_size
    if tokenizer is not None and VOCO_TOKEN in tokenizer.get_vocab():
        voco_token_id = _add_voco_token(tokenizer)
        if voco_token_id >= vocab_size:
            raise ValueError(
                f"<voco> is token {voco_token_id} of the tokenizer, but the checkpoint has {vocab_size} tokens; "
                "the tokenizer does not belong to it"
            )
        return voco_token_id, "the tokenizer"
    if vocab_size != LLAMA_VOCAB_SIZE + 1:
        raise ValueError(
            f"{checkpoint.source} has vocab_size {vocab_size} and no tokenizer that knows <voco>; "
            f"{LLAMA_VOCAB_SIZE + 1} was expected, Llama's {LLAMA_VOCAB_SIZE} tokens and <voco>"
        )
    if tokenizer is not None and (voco_token_id := _add_voco_token(tokenizer)) != LLAMA_VOCAB_SIZE:
        raise ValueError(
            f"<voco> is token {LLAMA_VOCAB_SIZE} of the checkpoint, but would be {voco_token_id} of the tokenizer; "
            "the tokenizer does not belong to it"
        )
    return LLAMA_VOCAB_SIZE, "the last row of the vocabulary"


def _make_voco_token(checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, str]:
    """Gives a checkpoint its `<voco>`. Returns the id, and where it came from."""
    vocab_size = checkpoint.text_config.vocab_size
    if tokenizer is None:
        voco_token_id, known = vocab_size, False
    else:
        known = VOCO_TOKEN in tokenizer.get_vocab()
        voco_token_id = _add_voco_token(tokenizer)
    if voco_token_id > vocab_size:
        raise ValueError(
            f"<voco> would be token {voco_token_id} of the tokenizer, but the checkpoint has {vocab_size} tokens; "
            "the tokenizer does not belong to it"
        )
    if known and voco_token_id < vocab_size:
        return voco_token_id, "the tokenizer"
    for name in (EMBEDDING, LM_HEAD):
        # A checkpoint with tied embeddings has no lm_head of its own
        if name in checkpoint.state_dict:
            weight = checkpoint.state_dict[name]
            mean = weight[:voco_token_id].mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
            checkpoint.state_dict[name] = torch.cat([weight[:voco_token_id], mean, weight[voco_token_id + 1 :]])
    if voco_token_id < vocab_size:
        return voco_token_id, "a free row of the padded vocabulary"
    checkpoint.text_config.vocab_size = vocab_size + 1
    return voco_token_id, "a row added to the vocabulary"


def _vision_prefix(checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The BOS token, if the language model has one."""
    bos_token_id = checkpoint.text_config.bos_token_id if tokenizer is None else tokenizer.bos_token_id
    return [] if bos_token_id is None else [bos_token_id]


def _vision_suffix(
    checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase | None, voco_token_id: int
) -> list[int]:
    """The newline between image and VoCo tokens."""
    if tokenizer is None:
        checkpoint.warnings.append(
            f"without a tokenizer vision_suffix_token_ids is [{LLAMA_NEWLINE_ID}], the newline of Llama; "
            "pass tokenizer or vision_suffix_token_ids if the model has another"
        )
        return [LLAMA_NEWLINE_ID]
    ids = tokenizer.encode(f"\n{VOCO_TOKEN}", add_special_tokens=False)
    suffix = ids[: ids.index(voco_token_id)]
    if not suffix:
        checkpoint.warnings.append("the tokenizer drops newlines: vision_suffix_token_ids is empty")
    return suffix


def _build_config(
    checkpoint: _Checkpoint, voco_token_id: int, prefix: list[int], suffix: list[int], num_voco_tokens: int | None
) -> VoCoLlamaConfig:
    """The configuration of the converted model."""
    vocab_size = checkpoint.text_config.vocab_size
    if bad := [token_id for token_id in prefix + suffix if not 0 <= token_id < vocab_size]:
        raise ValueError(
            f"vision_prefix_token_ids {prefix} and vision_suffix_token_ids {suffix} hold {bad}; "
            f"ids of 0 to {vocab_size - 1} were expected"
        )
    arguments = dict(checkpoint.llava_arguments)
    if num_voco_tokens is not None:
        arguments["num_voco_tokens"] = num_voco_tokens
    with _as_value_error("the configuration is not valid"):
        return VoCoLlamaConfig(
            text_config=checkpoint.text_config,
            vision_config=checkpoint.vision_config,
            voco_token_id=voco_token_id,
            vision_prefix_token_ids=prefix,
            vision_suffix_token_ids=suffix,
            **arguments,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' tables of keys that do not fit: those are errors here, and raised."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _some(names: set[str]) -> str:
    """The first few of many names."""
    return ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _build_model(
    checkpoint: _Checkpoint, config: VoCoLlamaConfig, dtype: torch.dtype | None
) -> VoCoLlamaForConditionalGeneration:
    """The converted model. Every weight must be there, known and of the right shape."""
    with _quiet():
        loaded: Any = VoCoLlamaForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=checkpoint.state_dict,
            dtype=dtype or checkpoint.state_dict[EMBEDDING].dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    problems = [f"{title}: {_some(info[key])}" for key, title in PROBLEMS.items() if info[key]]
    problems += [
        f"of another shape: {name} is {list(found)}, the configuration says {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])[:4]
    ]
    if problems:
        raise ValueError(
            f"the weights of {checkpoint.source} do not fit its configuration "
            f"(vision tower: {checkpoint.vision_tower}); {'; '.join(problems)}"
        )
    if (checkpoint.source / GENERATION_CONFIG_NAME).is_file():
        with _as_value_error(f"{checkpoint.source / GENERATION_CONFIG_NAME} is not a generation configuration"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.source)
    return model


def _build_processor(
    checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase | None, num_voco_tokens: int
) -> VoCoLlamaProcessor | None:
    """The processor, if there is a tokenizer and an image processor to make it from."""
    if tokenizer is None:
        checkpoint.warnings.append(f"{checkpoint.source} has no tokenizer: no processor was written; pass tokenizer")
        return None
    image_processor = _load_image_processor(checkpoint)
    if image_processor is None:
        checkpoint.warnings.append(
            f"no image processor in {' or '.join(map(str, checkpoint.image_processor_sources))}: "
            "the tokenizer was written, but no processor; pass vision_tower"
        )
        return None
    chat_template = _chat_template(checkpoint, tokenizer)
    return VoCoLlamaProcessor(image_processor, tokenizer, num_voco_tokens=num_voco_tokens, chat_template=chat_template)


def _load_image_processor(checkpoint: _Checkpoint) -> BaseImageProcessor | None:
    """The image processor of the vision tower, which pads images to squares first where the checkpoint says so."""
    for source in checkpoint.image_processor_sources:
        try:
            image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
        except OSError:  # it has none
            continue
        if checkpoint.pad_to_square:
            # Saved as a LlavaImageProcessor, whose backend is chosen where it is loaded
            return LlavaImageProcessorPil.from_dict({**image_processor.to_dict(), "do_pad": True})
        return image_processor
    return None


def _chat_template(checkpoint: _Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template of the checkpoint or of its tokenizer, with `<image>` where an image goes."""
    processor, _ = ProcessorMixin.get_processor_dict(checkpoint.source)
    template = processor.get("chat_template") or tokenizer.chat_template or checkpoint.chat_template
    image_token = processor.get("image_token", IMAGE_TOKEN)
    if isinstance(template, dict):
        return {name: text.replace(image_token, IMAGE_TOKEN) for name, text in template.items()}
    return template and template.replace(image_token, IMAGE_TOKEN)


def _write(
    target: Path,
    model: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor | PreTrainedTokenizerBase | None,
) -> None:
    """Writes everything into a folder next to `target`, which then takes its place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as aside:
        # Shards of this size show progress while they are written
        model.save_pretrained(aside, max_shard_size="5GB")
        if processor is not None:
            processor.save_pretrained(aside)


__all__ = ["ConversionReport", "convert_checkpoint"]
