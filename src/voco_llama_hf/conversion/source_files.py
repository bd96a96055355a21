"""Files of a source: JSON, weights, and what is wrong with them told in one line."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers.modeling_utils import load_state_dict
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME, logging

from ..files import inside


T = TypeVar("T")


@contextmanager
def as_value_error(message: str) -> Iterator[None]:
    """Turns what transformers raises for unusable files and settings into a ValueError that starts with `message`."""
    try:
        yield
    except Exception as error:  # a bare Exception is what the tokenizers library raises
        raise ValueError(f"{message}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    with as_value_error(f"{path} is not a JSON file"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; an object was expected")
    return content


def choose(config: dict[str, Any], name: str, meanings: dict[object, T], default: object = None) -> T:
    """What the value of a field means, if it is one of the values known."""
    value = config.get(name, default)
    for known, meaning in meanings.items():
        if value == known:
            return meaning
    expected = " or ".join(repr(known) for known in meanings)
    raise ValueError(f"{CONFIG_NAME} has {name} {value!r}; {expected} was expected")


def weight_files(source: Path) -> list[Path]:
    """The weight files of a checkpoint folder; safetensors before `.bin`, as transformers prefers them."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        index = source / f"{name}.index.json"
        if (source / name).is_file():
            return [source / name]
        if index.is_file():
            with as_value_error(f"{index} does not map weights to shards"):
                shards = [inside(source, shard) for shard in sorted(set(read_json(index)["weight_map"].values()))]
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


def read_weights(source: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint folder, memory-mapped; `.bin` files are read with `weights_only=True`."""
    state_dict: dict[str, torch.Tensor] = {}
    for file in logging.tqdm(weight_files(source), desc="Reading weight files"):
        with as_value_error(f"{file} is damaged or is not a file of weights"):
            tensors = load_state_dict(file)
        if not isinstance(tensors, dict) or not all(torch.is_tensor(tensor) for tensor in tensors.values()):
            raise ValueError(f"{file} does not hold a state dict; a dictionary of tensors was expected")
        state_dict |= tensors
    return state_dict


def rename(state_dict: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    """A state dict under this package's names."""
    renamed = {}
    for name, tensor in state_dict.items():
        pattern = next((pattern for pattern in names if re.search(pattern, name)), None)
        renamed[name if pattern is None else re.sub(pattern, names[pattern], name)] = tensor
    return renamed
