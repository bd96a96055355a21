"""Writes tasks of lmms-eval about drawn scenes: the YAML files beside this one, with their images and videos.

python examples/lmms_tasks/write.py tasks --scenes 60
"""

import argparse
import shutil
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
from datasets import Dataset, Features, Image, List, Value

from voco_llama_hf.scenes import make_clips, make_scenes


FEATURES = Features(
    {
        "image": Image(),
        "second": Image(),
        "question": Value("string"),
        "answer": Value("string"),
        "choices": List(Value("string")),
    }
)


def write_tasks(folder: Path, num_scenes: int, num_questions: int = 7, num_clips: int = 2) -> None:
    """Tasks whose questions about the same image are neighbours."""
    shutil.copytree(
        Path(__file__).parent, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("write.py", "__*")
    )
    scenes = list(make_scenes("test", num_scenes))
    answers = defaultdict(set)
    for scene in scenes:
        for family, answer in zip(scene["families"], scene["answers"]):
            answers[family].add(answer)
    rows = [
        {
            "image": scene["image"],
            "second": scenes[(i + 1) % num_scenes]["image"],
            "question": question,
            "answer": answer,
            "choices": sorted([answer, *sorted(answers[family] - {answer})[:3]]),
        }
        for i, scene in enumerate(scenes)
        for question, answer, family in list(zip(scene["questions"], scene["answers"], scene["families"]))[
            :num_questions
        ]
    ]
    Dataset.from_list(rows, features=FEATURES).to_parquet(folder / "questions.parquet")
    films = []
    for i, clip in enumerate(make_clips("test", num_clips)):
        write_video(folder / f"clip{i}.mp4", [np.asarray(frame.convert("RGB")) for frame in clip["images"]])
        films += [
            {"video": f"clip{i}.mp4", "question": question, "answer": answer}
            for question, answer in list(zip(clip["questions"], clip["answers"]))[:2]
        ]
    Dataset.from_list(films).to_parquet(folder / "videos.parquet")


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=60)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_tasks(arguments.folder, arguments.scenes)
