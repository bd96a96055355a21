"""Evaluation results in the Hub's model-index form, with the settings of the compression."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..pictures import name_number


TASK = "image-text-to-text"
UNCOMPRESSED = "uncompressed"
PER_TILE = "num_voco_tokens_per_tile"
BLIND = "blind"
SCENES, VIDEOS = "voco-scenes", "voco-scenes-videos"


def eval_result(
    dataset: str,
    metric: str,
    value: float,
    num_voco_tokens: int | None,
    config: str | None = None,
    split: str | None = None,
    per_tile: bool = False,
) -> EvalResult:
    """
    One figure of a model.

    Args:
        dataset (`str`):
            Name of the data, or its id on the Hub.
        metric (`str`):
            Name of the metric, as in `"exact_match"`.
        value (`float`):
            The figure; shares in percent.
        num_voco_tokens (`int`, *optional*):
            VoCo tokens that an image was read from; `None` for uncompressed images.
        config, split (`str`, *optional*):
            Part of the data.
        per_tile (`bool`, *optional*, defaults to `False`):
            Whether each tile of an image had so many.
    """
    args: dict[str, Any] = {"attention_mode": UNCOMPRESSED}
    reading = UNCOMPRESSED
    if num_voco_tokens is not None:
        args = name_number(num_voco_tokens, per_tile)
        reading = f"k={num_voco_tokens}{' of every tile' if per_tile else ''}"
    return EvalResult(
        task_type=TASK,
        dataset_type=dataset,
        dataset_name=f"{dataset}, {config}" if config else dataset,
        dataset_config=config,
        dataset_split=split,
        metric_type=metric,
        metric_name=f"{metric.replace('_', ' ')}, {reading}",
        metric_value=round(value, 4),
        metric_args=args,
    )


def scenes_eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    Figures of [`~voco_llama_hf.scenes.ScenesResults`], given as its fields: exact match, the same with
    the images of other scenes, and the share of what seeing adds that compression keeps, all in percent.
    """
    figures = []
    for reading, scores in results["accuracy"].items():
        k = None if reading == UNCOMPRESSED else int(reading.removeprefix("k="))
        for difficulty, families in scores.items():

            def figure(metric: str, share: float, config: str = difficulty, k: int | None = k) -> EvalResult:
                return eval_result(SCENES, metric, 100 * share, k, config, results["split"])

            seen = families["all"]
            figures.append(figure("exact_match", seen))
            if reading not in results["blind"]:
                continue
            blind = results["blind"][reading][difficulty]["all"]
            figures.append(figure("exact_match_shuffled", blind))
            full = results["accuracy"].get(UNCOMPRESSED, {}).get(difficulty, {}).get("all", blind)
            if full != blind:
                figures.append(figure("retention", (seen - blind) / (full - blind)))
    return figures


def video_eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    Figures of [`~voco_llama_hf.scenes.VideoResults`], given as its fields: exact match in percent
    on the questions that need the order of the frames and on those that do not, from all frames, from one, and from
    all of them out of order.
    """
    return [
        eval_result(VIDEOS, metric, 100 * readings[reading][group], int(k.removeprefix("k=")), group, results["split"])
        for k, readings in results["accuracy"].items()
        for group in ("temporal", "still")
        for metric, reading in (
            ("exact_match", "all frames"),
            ("exact_match_one_frame", "one frame"),
            ("exact_match_out_of_order", "out of order"),
        )
        if group in readings[reading]
    ]


def lmms_eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """
    Figures of [`~voco_llama_hf.integrations.lmms_eval.results.LmmsResults`], given as JSON has them: the metric of
    each task at each number of VoCo tokens, uncompressed and with images of other questions, and retention in percent.
    Shares are as lmms-eval gives them, from 0 to 1. Bounds that another model gave are not this model's figures.
    """
    figures = []
    for task, info in results["tasks"].items():
        dataset = info["dataset"] or task

        def figure(metric: str, value: float, k: int | None, dataset: str = dataset, info: dict = info) -> EvalResult:
            return eval_result(dataset, metric, value, k, info["config"], info["split"])

        for reading, scores in results["readings"].items():
            value, k = scores["tasks"][task]["metrics"][info["metric"]], scores["num_voco_tokens"]
            if k is not None and reading not in (results["upper"], results["lower"]):
                figures.append(figure(info["metric"], value, k))
                if results["retention"][reading][task] is not None:
                    figures.append(figure("retention", 100 * results["retention"][reading][task], k))
            elif reading == UNCOMPRESSED:
                figures.append(figure(info["metric"], value, None))
            elif reading == BLIND:
                figures.append(figure(f"{info['metric']}_shuffled", value, None))
    return figures


def load_eval_results(path: Path) -> list[EvalResult]:
    """
    Reads what `voco-llama evaluate --output` wrote of images, videos or tasks of lmms-eval, or the `results.json` of
    the embedded checkpoint, which has images and videos.

    Raises:
        ValueError: if the file holds something else.
    """
    try:
        results = json.loads(path.read_text())
        if results.get("suite") == "lmms":
            return lmms_eval_results(results)
        if "num_clips" in results:
            return video_eval_results(results)
        videos = video_eval_results(results["videos"]) if "videos" in results else []
        return [*scenes_eval_results(results.get("test", results)), *videos]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not what voco-llama evaluate --output writes ({error!r})") from error


def merge_eval_results(old: Sequence[EvalResult], new: Sequence[EvalResult]) -> list[EvalResult]:
    """Old figures and new ones, which take the place of old ones of the same metric and settings."""
    kept = [figure for figure in old if not any(figure.is_equal_except_value(other) for other in new)]
    return [*kept, *new]


def results_tables(figures: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """One table a data set: a row for every setting of the compression, a column for every metric."""
    tables: dict[tuple, dict[str, Any]] = {}
    for figure in figures:
        key = figure.dataset_name, figure.dataset_split
        table = tables.setdefault(key, {"name": figure.dataset_name, "split": figure.dataset_split, "rows": {}})
        table["rows"].setdefault(reading_of(figure), {})[figure.metric_type] = figure.metric_value
    for table in tables.values():
        table["metrics"] = list(dict.fromkeys(metric for row in table["rows"].values() for metric in row))
        table["rows"] = {
            reading: [format_value(row.get(metric)) for metric in table["metrics"]]
            for reading, row in table["rows"].items()
        }
    return list(tables.values())


def reading_of(figure: EvalResult) -> str:
    """What the images were read from, as it stands in a table."""
    args = figure.metric_args or {}
    if "num_voco_tokens" in args:
        return f"k = {args['num_voco_tokens']}"
    if PER_TILE in args:
        return f"k = {args[PER_TILE]} of every tile"
    return str(args.get("attention_mode", ""))


def format_value(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.1f}"
    return "" if value is None else str(value)


__all__ = [
    "eval_result",
    "lmms_eval_results",
    "load_eval_results",
    "merge_eval_results",
    "results_tables",
    "scenes_eval_results",
    "video_eval_results",
]
