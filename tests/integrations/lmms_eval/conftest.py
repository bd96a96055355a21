import shutil
from pathlib import Path

import pytest

from voco_llama_hf import EMBEDDED_CHECKPOINT


NUM_SCENES, NUM_QUESTIONS = 4, 3
COLOURS = ["red", "green", "blue", "yellow", "orange"]


@pytest.fixture(scope="session", autouse=True)
def own_caches(tmp_path_factory):
    """What lmms-eval and data sets keep between runs is not that of the person who tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Tasks in lmms-eval's YAML format: a few scenes, each with several questions, neighbours sharing an image."""
    import datasets
    import numpy as np
    from video_files import write_video

    from voco_llama_hf.scenes import make_clips, make_scenes

    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(Path(__file__).parent / "tasks", folder, dirs_exist_ok=True)
    scenes = make_scenes("test", NUM_SCENES)
    rows = [
        {
            "image": scene["image"],
            "second": scenes[(i + 1) % NUM_SCENES]["image"],
            "question": question,
            "answer": answer,
            "choices": [answer, *[word for word in COLOURS if word != answer][:3]],
        }
        for i, scene in enumerate(scenes)
        for question, answer in list(zip(scene["questions"], scene["answers"]))[:NUM_QUESTIONS]
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "second": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "choices": datasets.List(datasets.Value("string")),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "questions.parquet")
    clips = make_clips("test", 2)
    films = []
    for i, clip in enumerate(clips):
        write_video(folder / f"clip{i}.mp4", np.stack([np.asarray(frame.convert("RGB")) for frame in clip["images"]]))
        films += [
            {"video": f"clip{i}.mp4", "question": question, "answer": answer}
            for question, answer in list(zip(clip["questions"], clip["answers"]))[:2]
        ]
    datasets.Dataset.from_list(films).to_parquet(folder / "videos.parquet")
    return folder


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
