"""
Conversion of checkpoints of the authors' code and of llava-hf into this package's format.

Both hold a Llava: a CLIP vision tower, a two-layer projector and a language model, under different names. What a
VoCo-LLaMA has on top is the `<voco>` token, which the authors' checkpoints bring and llava-hf checkpoints are given.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME

from .formats import read_checkpoint
from .voco_token import place_voco_token, vision_prefix, vision_suffix
from .writing import build_config, build_model, build_processor, load_tokenizer, write


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ConversionReport:
    """
    What [`convert_checkpoint`] did.

    Args:
        source, target (`Path`):
            The checkpoint read and the checkpoint written.
        source_format (`str`):
            `"llava_llama"` (the authors' format), or `"llava"`, `"llava_next"` or `"llava_onevision"` (llava-hf).
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
    Converts a checkpoint of the authors' code (`model_type: llava_llama`) or of llava-hf (`model_type: llava`,
    `llava_next` or `llava_onevision`) into a folder for [`VoCoLlamaForConditionalGeneration.from_pretrained`].

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
    >>> from voco_llama_hf import convert_checkpoint

    >>> report = convert_checkpoint("llava-1.5-7b-hf", "voco-llava-1.5-7b", num_voco_tokens=2)
    >>> report.voco_token_id, report.voco_token_origin
    (32002, 'a free row of the padded vocabulary')
    ```"""
    source, target = _check_folders(Path(source), Path(target))
    torch_dtype = _check_dtype(dtype)
    checkpoint = read_checkpoint(source, vision_tower)
    text_tokenizer = load_tokenizer(checkpoint, tokenizer)
    voco_token_id, voco_token_origin = place_voco_token(checkpoint, text_tokenizer)
    prefix, suffix = vision_prefix_token_ids, vision_suffix_token_ids
    if prefix is None:
        prefix = vision_prefix(checkpoint, text_tokenizer)
    if suffix is None:
        suffix = vision_suffix(checkpoint, text_tokenizer, voco_token_id)

    config = build_config(checkpoint, voco_token_id, prefix, suffix, num_voco_tokens)
    model = build_model(checkpoint, config, torch_dtype)
    processor = build_processor(checkpoint, text_tokenizer, config.num_voco_tokens)
    # Without an image processor there is no processor, but the tokenizer that knows <voco> is still worth keeping
    write(target, model, processor or text_tokenizer)
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


__all__ = ["ConversionReport", "convert_checkpoint"]
