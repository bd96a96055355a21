"""Tasks of lmms-eval at each number of VoCo tokens, and at the bounds. What was answered is not asked again."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger
from tqdm import tqdm

from ...files import written_aside
from ...hub.card import NUM_TEXT_TOKENS
from ...hub.cost import CostModel
from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from . import MODEL_ID
from .model import LoadedVoCoLlama
from .reading import AttentionMode
from .results import LmmsResults, ReadingScores, TaskInfo, TaskScores


BATCHES_A_PART = 8  # answered before they are written: what an interruption costs
UNCOMPRESSED, BLIND = "uncompressed", "blind"
UPPER_BOUND, LOWER_BOUND = "upper bound", "lower bound"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Network = tuple[VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor]


@dataclass(frozen=True)
class Row:
    """
    One way to read the images.

    Args:
        name (`str`): What tables and files call it.
        attention_mode (`str`): As of [`VoCoLlama`].
        num_voco_tokens (`int`): VoCo tokens of an image.
        blind (`bool`): Whether questions are asked about the images of others.
        is_bound (`bool`): Whether the model of the bounds answers, where it is another one.
    """

    name: str
    attention_mode: AttentionMode
    num_voco_tokens: int
    blind: bool = False
    is_bound: bool = False


def make_rows(counts: Sequence[int], bound_tokens: int | None = None) -> list[Row]:
    """
    Args:
        counts (`Sequence[int]`): Numbers of VoCo tokens.
        bound_tokens (`int`, *optional*):
            VoCo tokens of the model that was trained for the bounds. Without one the model's own bounds are asked.

    Returns:
        `list[Row]`: The upper bound, each number, the lower bound.
    """
    compressed = [Row(f"k={k}", "voco", k) for k in sorted(set(counts))]
    if bound_tokens is None:
        return [Row(UNCOMPRESSED, "uncompressed", 1), *compressed, Row(BLIND, "uncompressed", 1, blind=True)]
    return [
        Row(UPPER_BOUND, "causal", bound_tokens, is_bound=True),
        *compressed,
        Row(LOWER_BOUND, "voco", bound_tokens, is_bound=True),
    ]


class RecordedVoCoLlama(lmms):
    """
    A model whose answers are written down while others are still made.

    Args:
        model ([`LoadedVoCoLlama`]): Model that answers.
        answers (`Path`): SQLite file, with a log beside it; what is there is not asked again.
        identity (`str`): What answers depend on beside the question.
    """

    is_simple = True

    def __init__(self, model: LoadedVoCoLlama, answers: Path, identity: str):
        super().__init__()
        model.answerer.show_progress = False
        self.model, self.device = model, model.device
        self.task_dict = model.task_dict
        self.recorded = ResponseCache(
            str(answers), str(answers.with_suffix(".jsonl")), identity, eval_version=version("lmms-eval")
        )

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        return self._in_parts("generate_until", requests)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        return self._in_parts("loglikelihood", requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        return self.model.generate_until_multi_round(requests)

    def _in_parts(self, kind: str, requests: list[Instance]) -> list[Any]:
        size = BATCHES_A_PART * self.model.batch_size
        answers: list[Any] = []
        with tqdm(total=len(requests), desc="Answering") as bar:
            for start in range(0, len(requests), size):
                part = requests[start : start + size]
                answers += self.recorded.execute(self.model, kind, part)
                bar.update(len(part))
        return answers


@dataclass(frozen=True)
class Settings:
    """
    How tasks are asked.

    Args:
        limit (`int`, *optional*): Questions of a task at most.
        batch_size (`int`): Questions answered at a time.
        num_frames (`int`, *optional*): Frames of a video; by default the number of the checkpoint.
        include_path (`Path`, *optional*): Folder of further tasks in lmms-eval's YAML format.
    """

    limit: int | None = None
    batch_size: int = 16
    num_frames: int | None = None
    include_path: Path | None = None


class Suite:
    """
    Runs tasks in a folder, where an interrupted run goes on.

    Args:
        work_dir (`Path`): Folder of answers and results.
        tasks (`Sequence[str]`): Names of tasks or groups, each with the metric of the tables where it is not the
            task's first, as in `"seedbench:seed_all"`.
        settings ([`Settings`]): How they are asked.

    Raises:
        ValueError: if lmms-eval does not know one of the tasks.
    """

    def __init__(self, work_dir: Path, tasks: Sequence[str], settings: Settings):
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
        include = None if settings.include_path is None else str(settings.include_path)
        self.manager = TaskManager("WARNING", include_path=include, model_name=MODEL_ID)
        self.metrics = {name: metric or None for name, _, metric in (task.partition(":") for task in tasks)}
        for name in self.metrics:
            if name not in self.manager.all_tasks:
                close = get_close_matches(name, self.manager.all_tasks, 3)
                hint = f": did you mean {' or '.join(close)}?" if close else ", see lmms-eval tasks"
                raise ValueError(f"lmms-eval has no task {name!r}{hint}")
        self.work_dir, self.settings = work_dir, settings

    def run(
        self,
        network: Network,
        counts: Sequence[int],
        bound: Network | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> LmmsResults:
        """
        Args:
            network (`tuple`): Model and processor.
            counts (`Sequence[int]`): Numbers of VoCo tokens.
            bound (`tuple`, *optional*):
                A model that was trained with VoCo tokens and nothing hidden, and its processor: what it answers with
                all before it in sight is the upper bound, and from its VoCo tokens alone the lower one (paper,
                Table 1). By default the model itself, uncompressed, and uncompressed with images of other questions.
            report (`Callable`): Is told what comes next.

        Returns:
            [`LmmsResults`]
        """
        rows = make_rows(counts, None if bound is None else bound[1].num_voco_tokens)
        prints = {is_bound: fingerprint(model) for is_bound, model in ((False, network), (True, bound)) if model}
        records: dict[str, dict[str, dict[str, Any]]] = {}
        for row in rows:
            answering = bound if row.is_bound and bound else network
            for task in self.metrics:
                report(f"{task}, {row.name}")
                record = self._record(row, task, answering, prints[row.is_bound])
                records.setdefault(row.name, {})[task] = record
        cost = CostModel(network[0].config)
        infos = {task: self._info(task, records[rows[0].name][task]) for task in self.metrics}
        readings = {row.name: as_scores(row, cost, records[row.name]) for row in rows}
        return LmmsResults(infos, readings, rows[0].name, rows[-1].name, version("lmms-eval"), self.settings.limit)

    def _record(self, row: Row, task: str, network: Network, identity: str) -> dict[str, Any]:
        """What a task gave, from the folder where it is there."""
        folder = self.work_dir / row.name.replace(" ", "-")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{task}.json"
        settings = self._identify(row, task, identity)
        if path.is_file():
            record = json.loads(path.read_text())
            if record["settings"] == settings:
                return record
        record = {"settings": settings, **self._ask(row, task, network, json.dumps(settings), folder)}
        with written_aside(path) as part:
            part.write_text(json.dumps(record, indent=2) + "\n")
        return record

    def _identify(self, row: Row, task: str, identity: str) -> dict[str, Any]:
        """What a result depends on, as JSON has it."""
        source = self.manager.task_index[task]["yaml_path"]
        return {
            **asdict(row),
            "model": identity,
            "limit": self.settings.limit,
            "num_frames": self.settings.num_frames,
            "lmms_eval": version("lmms-eval"),
            "task": None if source == -1 else hash_sources(Path(source).parent),
        }

    def _ask(self, row: Row, task: str, network: Network, identity: str, folder: Path) -> dict[str, Any]:
        model = LoadedVoCoLlama(
            *network,
            num_voco_tokens=row.num_voco_tokens,
            attention_mode=row.attention_mode,
            blind=row.blind,
            num_frames=self.settings.num_frames,
            batch_size=self.settings.batch_size,
        )
        recorded = RecordedVoCoLlama(model, folder / f"{task}.answers.db", identity)
        results = simple_evaluate(
            recorded,
            tasks=[task],
            task_manager=self.manager,
            batch_size=self.settings.batch_size,
            limit=self.settings.limit,
            bootstrap_iters=0,
            log_samples=False,
            # Tasks that write files for a server of theirs ask where to
            cli_args=Namespace(output_path=str(folder), process_with_media=False),
        )
        recorded.recorded.close()
        answerer = model.answerer
        return {
            **describe(results, task),
            "seconds": answerer.seconds / answerer.num_answered if answerer.num_answered else None,
            "images_read": answerer.reading.num_read,
            "images_reused": answerer.reading.num_reused,
        }

    def _info(self, task: str, record: dict[str, Any]) -> TaskInfo:
        wanted, there = self.metrics[task], record["metrics"]
        if wanted is not None and wanted not in there:
            raise ValueError(f"the task {task} has no metric {wanted!r}, it has {', '.join(there)}")
        metric = wanted or next(iter(there))
        return TaskInfo(metric, record["num_samples"], record["dataset"], record["config"], record["split"])


def as_scores(row: Row, cost: CostModel, records: dict[str, dict[str, Any]]) -> ReadingScores:
    """A row of the tables from what its tasks gave."""
    if row.attention_mode == "voco":
        image = cost.compressed(row.num_voco_tokens, NUM_TEXT_TOKENS)
    else:
        image = cost.uncompressed(NUM_TEXT_TOKENS)
    scores = {
        task: TaskScores(record["metrics"], record["seconds"], record["images_read"], record["images_reused"])
        for task, record in records.items()
    }
    return ReadingScores(row.num_voco_tokens if row.attention_mode == "voco" else None, image, scores)


def describe(results: dict[str, Any], task: str) -> dict[str, Any]:
    """
    What tables and cards need of the results of lmms-eval.

    Raises:
        ValueError: if there is no number among them.
    """
    found = {
        name.split(",")[0]: float(value)
        for name, value in results["results"][task].items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name and "," in name
    }
    config = results["configs"].get(task, {})
    order = [one["metric"] for one in config.get("metric_list") or []]
    metrics = {name: found[name] for name in [*(name for name in order if name in found), *found]}
    if not metrics:
        raise ValueError(f"the task {task} gave no number: some are scored by a server or a judge of theirs")
    dataset = config.get("dataset_path")
    is_on_hub = isinstance(dataset, str) and HUB_ID.fullmatch(dataset) is not None
    return {
        "metrics": metrics,
        "num_samples": sum(size["effective"] for size in results["n-samples"].values()),
        "dataset": dataset if is_on_hub else None,
        "config": config.get("dataset_name") if is_on_hub else None,
        "split": config.get("test_split") or config.get("validation_split"),
    }


def fingerprint(network: Network) -> str:
    """Hash of what the answers of a model depend on: all weights and settings, not where they lie."""
    model, processor = network
    settings = [model.config.to_dict(), model.generation_config.to_dict(), processor.image_processor.to_dict()]
    for part in settings:
        part.pop("_name_or_path", None)
    sha256 = hashlib.sha256(json.dumps([*settings, processor.chat_template], sort_keys=True, default=str).encode())
    for name, weights in model.state_dict().items():
        sha256.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
        sha256.update(weights.detach().contiguous().view(torch.uint8).cpu().numpy())
    return sha256.hexdigest()


def hash_sources(folder: Path) -> str:
    """Hash of the files that a task is written in."""
    sha256 = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in ("", ".py", ".yaml")):
        sha256.update(path.name.encode() + b"\0" + path.read_bytes())
    return sha256.hexdigest()


__all__ = ["Network", "RecordedVoCoLlama", "Row", "Settings", "Suite", "make_rows"]
