"""Where the files of an exported model are: in its folder or repository, or in a folder `onnx` there."""

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import GenerationConfig
from transformers.utils.hub import cached_file

from ..modeling import VoCoLlamaConfig, VoCoLlamaProcessor
from .files import COMPRESSOR_FILE, DECODER_FILE, VISION_FILE, data_file


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
ONNX_FOLDER = "onnx"
PROCESSOR_FILE = "processor_config.json"
PROCESSOR_FILES = (PROCESSOR_FILE, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass
class ExportedFiles:
    """
    Args:
        compressor, decoder (`Path`): The graphs.
        vision (`Path`, *optional*): The graph in front of them, of a model that divides images.
        copied (`list[Path]`): All files that a copy of the model consists of, beside its configurations.
        config ([`VoCoLlamaConfig`]): Configuration of the model that was exported.
        generation_config ([`~transformers.GenerationConfig`], *optional*): How it generates by default.
    """

    compressor: Path
    decoder: Path
    vision: Path | None
    copied: list[Path]
    config: VoCoLlamaConfig
    generation_config: GenerationConfig | None


def find_exported(
    model_id: str | os.PathLike, config: VoCoLlamaConfig | None = None, subfolder: str = "", **hub: Any
) -> ExportedFiles:
    """
    Finds, and where it has to downloads, the graphs and what belongs to them.

    Args:
        config ([`VoCoLlamaConfig`], *optional*): Configuration, instead of the one saved.
        subfolder (`str`, *optional*, defaults to `""`): Where to look, there and in its folder `onnx`.
        hub: What [`~transformers.utils.cached_file`] takes.

    Raises:
        OSError: if there is no such model, or something of it is missing.
    """
    folder = subfolder
    for place in (subfolder, str(PurePosixPath(subfolder, ONNX_FOLDER))):
        if find_file(model_id, COMPRESSOR_FILE, [place], **hub) is not None:
            folder = place
            break
    # Raises transformers' own errors where they are missing
    compressor, decoder = (
        Path(str(cached_file(model_id, file, subfolder=folder, **hub))) for file in (COMPRESSOR_FILE, DECODER_FILE)
    )
    # What belongs to the model and not to its graphs may lie above them
    places = [folder, *(str(parent).removeprefix(".") for parent in PurePosixPath(folder).parents)]
    vision = find_file(model_id, VISION_FILE, [folder], **hub)
    names = (COMPRESSOR_FILE, DECODER_FILE, VISION_FILE)
    weights = [find_file(model_id, data_file(name), [folder], **hub) for name in names]
    processor = [find_file(model_id, file, places, **hub) for file in PROCESSOR_FILES]
    saved_config = find_file(model_id, "config.json", places, **hub)
    if config is None:
        if saved_config is None:
            cached_file(model_id, "config.json", subfolder=folder, **hub)
        config = VoCoLlamaConfig.from_pretrained(Path(str(saved_config)).parent)
    saved_generation = find_file(model_id, "generation_config.json", places, **hub)
    return ExportedFiles(
        compressor,
        decoder,
        vision,
        copied=[compressor, decoder, *(path for path in (vision, *weights, *processor) if path is not None)],
        config=config,
        generation_config=None
        if saved_generation is None
        else GenerationConfig.from_pretrained(saved_generation.parent),
    )


def find_file(model_id: str | os.PathLike, name: str, places: list[str], **hub: Any) -> Path | None:
    """A file in the first of several subfolders that has it; None where none has, or none can be reached."""
    for place in places:
        found = cached_file(
            model_id,
            name,
            subfolder=place,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **hub,
        )
        if found is not None:
            return Path(found)
    return None


def find_processor(model_id: str | os.PathLike, **hub: Any) -> VoCoLlamaProcessor | None:
    """The processor saved with a model, if there is one."""
    if find_file(model_id, PROCESSOR_FILE, [hub.pop("subfolder", "")], **hub) is None:
        return None
    return VoCoLlamaProcessor.from_pretrained(model_id, **hub)
