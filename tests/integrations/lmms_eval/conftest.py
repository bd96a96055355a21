import runpy
from pathlib import Path

import pytest

from voco_llama_hf import EMBEDDED_CHECKPOINT


EXAMPLE = Path(__file__).parents[3] / "examples" / "lmms_tasks" / "write.py"


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """What lmms-eval and data sets keep between runs is not that of the person who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Tasks in lmms-eval's YAML format: four scenes with three questions each, two videos with two."""
    folder = tmp_path_factory.mktemp("tasks")
    runpy.run_path(str(EXAMPLE))["write_tasks"](folder, num_scenes=4, num_questions=3)
    return folder


@pytest.fixture(scope="session")
def docs(task_folder):
    """The questions about images."""
    import datasets

    return datasets.load_dataset("parquet", data_files=str(task_folder / "questions.parquet"), split="train")


@pytest.fixture(scope="session")
def num_choices(docs) -> int:
    """Answers whose likelihood is asked for."""
    return sum(map(len, docs["choices"]))


@pytest.fixture(scope="session")
def run_task(task_folder):
    """Runs lmms-eval as its command does, with the model that its registry finds."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False, model_name="voco_llama")

    def run(task: str, model: str = "voco_llama", use_cache: Path | None = None, batch_size: int = 4, **arguments):
        arguments = {"pretrained": EMBEDDED_CHECKPOINT, "dtype": "float32", "device": "cpu", **arguments}
        return simple_evaluate(
            model,
            model_args=",".join(f"{name}={value}" for name, value in arguments.items()),
            tasks=[task],
            task_manager=manager,
            batch_size=batch_size,
            use_cache=None if use_cache is None else str(use_cache),
        )

    return run


@pytest.fixture(scope="session")
def network():
    """The model that the tests run, and its processor."""
    from voco_llama_hf.loading import load_model, load_processor

    return load_model(str(EMBEDDED_CHECKPOINT), dtype="float32"), load_processor(str(EMBEDDED_CHECKPOINT))
