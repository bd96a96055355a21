"""`voco-llama card`: the model card of a saved model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageProblem
from .loading import find_model


class Relation(StrEnum):
    """How a model was made of its base model, in the Hub's words."""

    finetune = "finetune"
    adapter = "adapter"
    quantized = "quantized"
    merge = "merge"


LicenseOption = Annotated[str | None, typer.Option("--license", help="Licence, as in apache-2.0.")]
BaseModelOption = Annotated[str | None, typer.Option(help="Hub id of the model that this one was made of.")]
RelationOption = Annotated[
    Relation | None,
    typer.Option("--relation", help="How it was made of the base model. By default finetune, of adapters adapter."),
]
DatasetsOption = Annotated[
    list[str] | None, typer.Option("--dataset", help="Hub id of training data; can be given several times.")
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        "--results", help="Results of voco-llama evaluate --output. By default results.json of the model folder."
    ),
]


def card(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or one of adapters.")],
    repo_id: Annotated[str | None, typer.Option(help="Hub id that the quick start is to load.")] = None,
    license: LicenseOption = None,
    base_model: BaseModelOption = None,
    relation: RelationOption = None,
    datasets: DatasetsOption = None,
    results: ResultsOption = None,
) -> None:
    """Write the model card of a saved model, or refresh it.

    voco-llama card voco-llava-1.5-7b --license llama2 --base-model llava-hf/llava-1.5-7b-hf

    Sections between <!-- voco-llama:... --> and <!-- /voco-llama:... --> are written anew; all else stays as it is.
    """
    check_model_folder(model)
    check_results(results)
    from .loading import silence_transformers

    silence_transformers()
    from voco_llama_hf.hub import write_card

    path = write_card(
        model,
        repo_id,
        results,
        license=license,
        base_model=base_model,
        base_model_relation=None if relation is None else relation.value,
        datasets=datasets or [],
    )
    typer.echo(path)


def check_model_folder(folder: Path) -> None:
    """
    Raises:
        UsageProblem: if it is not the folder of a saved model.
    """
    if not folder.is_dir():
        raise UsageProblem(f"no such model folder: {folder}")
    find_model(str(folder))


def check_results(path: Path | None) -> None:
    """
    Raises:
        UsageProblem: if there is no such file.
    """
    if path is not None and not path.is_file():
        raise UsageProblem(f"no such file of results: {path}")
