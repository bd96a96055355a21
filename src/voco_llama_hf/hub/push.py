"""A saved model as a repository on the Hub, in one commit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.constants import REPOCARD_NAME
from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling
from ..files import check_inside
from ..loading import ADAPTER_CONFIG_NAME, is_adapter_folder
from .card import CODE_FILE, PICTURE, folder_card, hub_base


# What a model is loaded from, and what its card shows; optimizer states, logs and pickles stay at home
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "*preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "results.json",
    "LICENSE*",
    "*.md",
    "*.png",
    "*.jpg",
    "*_voco_llama.py",
)
ONNX_FOLDER = "onnx"


@dataclass(frozen=True)
class PushedFile:
    """
    A file of a repository.

    Args:
        path (`str`): Where it goes.
        source (`Path` or `bytes`): What goes there.
    """

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return self.source.stat().st_size if isinstance(self.source, Path) else len(self.source)


@dataclass(frozen=True)
class PushPlan:
    """
    What a push sends.

    Args:
        files (`list[PushedFile]`): Files of the repository.
        left_out (`list[str]`): What else lies in the folder.
    """

    files: list[PushedFile]
    left_out: list[str]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def plan_push(folder: Path, repo_id: str, **card_options: Any) -> PushPlan:
    """
    Files that a model's repository is to have: weights, processor, code, its `onnx` folder, and the card refreshed for
    its name there. Adapters go without code, and name their base model as the Hub does. The folder itself is left as
    it is.

    Args:
        folder (`Path`): Model folder.
        repo_id (`str`): Repository.
        card_options: Arguments of [`make_card`]; `base_model` is where others find the base model of adapters.

    Raises:
        ValueError: if weights or configuration are missing, the base model of adapters is not on the Hub, or a file is
            a link that leads out of the folder.
    """
    is_adapter = is_adapter_folder(folder)
    present = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    chosen = [path for path in present if path.is_file() and any(fnmatch(path.name, pattern) for pattern in PATTERNS)]
    onnx = list(find_files(folder / ONNX_FOLDER))
    for path in (*chosen, *onnx):
        check_inside(folder, path)
    names = {path.name for path in chosen}
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(f"{folder} has no weights in safetensors files")
    if not names & {"config.json", "adapter_config.json"}:
        raise ValueError(f"{folder} has no config.json")
    files = [PushedFile(path.name, path) for path in chosen if path.name != REPOCARD_NAME]
    if is_adapter:
        base_model = card_options.get("base_model") or hub_base(folder)
        files = [file for file in files if file.path != ADAPTER_CONFIG_NAME]
        files.append(PushedFile(ADAPTER_CONFIG_NAME, adapter_config(folder, base_model)))
    elif CODE_FILE not in names:
        files += [PushedFile(path.name, path) for path in code_files()]
    if PICTURE.name not in names:
        files.append(PushedFile(PICTURE.name, PICTURE))
    files += [PushedFile(path.relative_to(folder).as_posix(), path) for path in onnx]
    card = folder_card(folder, repo_id, **{"ships_code": True, **card_options})
    files.append(PushedFile(REPOCARD_NAME, str(card).encode()))
    left_out = [path.name for path in present if path not in chosen and path.name != ONNX_FOLDER]
    return PushPlan(sorted(files, key=lambda file: file.path), left_out)


def adapter_config(folder: Path, base_model: str | None) -> bytes:
    """
    The configuration of adapters with the base model's name on the Hub: a folder of this machine means nothing there.

    Raises:
        ValueError: if it has no such name.
    """
    if base_model is None:
        raise ValueError(
            f"the base model of {folder} lies on this machine: push it and give its Hub id with --base-model, or push "
            "both as one model with --merge"
        )
    config = json.loads((folder / ADAPTER_CONFIG_NAME).read_text())
    return json.dumps({**config, "base_model_name_or_path": base_model}, indent=2).encode()


def find_files(folder: Path) -> Iterator[Path]:
    """Files of a folder and of those in it, but for hidden ones."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def code_files() -> list[Path]:
    """What `save_pretrained` writes next to the weights."""
    folder = Path(modeling.__file__).parent
    entries = [folder / CODE_FILE, folder / "processing_voco_llama.py"]
    return sorted({*entries, *(Path(path) for entry in entries for path in get_relative_import_files(entry))})


def push_model(
    folder: Path,
    repo_id: str,
    private: bool = False,
    create_pr: bool = False,
    commit_message: str = "Upload VoCo-LLaMA model",
    plan: PushPlan | None = None,
) -> CommitInfo:
    """
    Uploads a saved model to the Hub in one commit, so that nobody ever sees half of it. After a lost connection the
    same call goes on: large files that have arrived, and files that have not changed, are not sent again.

    Args:
        folder (`Path`):
            Model folder.
        repo_id (`str`):
            Repository, which is made if it is not there.
        private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
        create_pr (`bool`, *optional*, defaults to `False`):
            Whether to open a pull request instead of committing.
        commit_message (`str`, *optional*):
            Message of the commit.
        plan ([`PushPlan`], *optional*):
            What to send; [`plan_push`] by default.

    Returns:
        [`~huggingface_hub.CommitInfo`]

    Raises:
        ConnectionError: if the connection is lost.
        ValueError: if the folder is no complete model.
    """
    plan = plan or plan_push(folder, repo_id)
    api = HfApi(library_name="voco-llama-hf")
    operations = [
        CommitOperationAdd(file.path, file.source if isinstance(file.source, bytes) else str(file.source))
        for file in plan.files
    ]
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        return api.create_commit(repo_id, operations, commit_message=commit_message, create_pr=create_pr)
    except (httpx2.TransportError, RuntimeError) as error:
        # An upload that fails is wrapped by huggingface_hub
        cause = error if isinstance(error, httpx2.TransportError) else error.__cause__
        if not isinstance(cause, httpx2.TransportError):
            raise
        raise ConnectionError(
            f"the connection to {api.endpoint} was lost ({str(cause) or type(cause).__name__}): "
            "run the same command again, what has arrived is not sent twice"
        ) from error


__all__ = ["PushPlan", "plan_push", "push_model"]
