import io
import json
from dataclasses import replace

import pytest
from datasets import Dataset, disable_progress_bars
from PIL import Image
from rich.console import Console
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.data import phase_rows
from voco_llama_hf.scenes.evaluation import ScenesResults
from voco_llama_hf.scenes.recipe import Phase
from voco_llama_hf.scenes.retention.distilling import (
    DistillationStudy,
    Lesson,
    Lessons,
    lessons,
    run_distillation,
    with_answers,
)
from voco_llama_hf.scenes.retention.following import Point
from voco_llama_hf.scenes.retention.sizes import Size
from voco_llama_hf.scenes.retention.study import Courses
from voco_llama_hf.scenes.still import DIFFICULTIES, FAMILIES


disable_progress_bars()
PHASE = Phase("some", 1, 1e-3, "cosine", (1,), questions=2, describe=True, single=True)


def turns(row, role):
    return [turn["content"] for turn in row["messages"] if turn["role"] == role]


def test_the_first_scenes_keep_their_answers_and_the_others_have_the_teachers():
    rows = phase_rows(replace(RECIPE, keep_rows=True), PHASE, "train")
    said = [["a", "b", "c"], ["d", "e", "f"]]
    told = Dataset.from_dict({"index": range(4)}).with_transform(with_answers(rows, said, known=2))
    assert len(told) == 4
    for index in range(4):
        assert told[index]["image"].tobytes() == rows[index]["image"].tobytes()
        assert turns(told[index], "user") == turns(rows[index], "user")
    assert turns(told[1], "assistant") == turns(rows[1], "assistant")
    assert turns(told[3], "assistant") == ["d", "e", "f"]
    # What is kept is not changed
    assert turns(rows[3], "assistant") != ["d", "e", "f"]


def test_lessons_differ_in_who_answers_and_in_what_is_compared():
    arms = {arm.name: arm for arm in lessons()}
    assert len({arm.folder for arm in arms.values()}) == len(arms) == 9
    told = {name: (arm.known, arm.unknown) for name, arm in arms.items() if isinstance(arm, Lesson)}
    assert told == {name: (500, 0 if name.startswith("few") else 4000) for name in told}
    assert set(arms) - set(told) == {"trained at k=1", "trained at k=1, distilled"}
    # Each of the other ways to distil differs in one thing from the first
    half = arms["teacher's distribution"]
    assert replace(half, distillation_weight=0.0, name="teacher's words") == arms["teacher's words"]
    changes = {
        ", temperature 2": {"distillation_temperature": 2.0},
        " alone": {"distillation_weight": 1.0},
        ", first half": {"distilled_share": 0.5},
    }
    for way, change in changes.items():
        name = half.name + way
        assert replace(half, name=name, **change) == arms[name]


def test_the_table_has_mean_and_spread(tmp_path):
    results = [
        ScenesResults(
            "test", 1, {}, {"k=1": {d: dict.fromkeys(("objects", "all", *FAMILIES), value) for d in DIFFICULTIES}}, {}
        )
        for value in (0.5, 0.7)
    ]
    curves = [[Point(1, 2.0, 0.1), Point(2, loss, 0.3)] for loss in (1.0, 1.5)]
    found = Lessons({"steps": 2}, {"few answers": results}, Courses({}, {"few answers": curves}))
    console = Console(file=io.StringIO(), width=100)
    found.print(console)
    assert "60.0 ±14.1" in console.file.getvalue()
    found.save(tmp_path / "found.md")
    assert (tmp_path / "found.md").read_text().splitlines()[-1] == "| few answers |" + 4 * " 60.0 ±14.1 |"
    found.plot(tmp_path / "found.png")
    assert Image.open(tmp_path / "found.png").width > 1000


@pytest.mark.slow
def test_a_micro_study_asks_the_teacher_once(tmp_path):
    study = DistillationStudy(tmp_path, Size(RECIPE, steps=2, questions=2), compile=False)
    asked = {"report": lambda what: None, "known": 4, "unknown": 6}
    first = run_distillation(study, range(1), "validation", 4, **asked)
    assert list(first.results) == [arm.name for arm in lessons()]
    (path,) = tmp_path.glob("teacher-*.json")
    answers = json.loads(path.read_text())
    assert len(answers) == 6 and all(len(row) == 3 for row in answers)
    assert all(len(curve) == 2 for (curve,) in first.courses.curves.values())
    assert {tuple(tried) for tried in first.courses.search.values()} == {("0.001",)}
    first.save(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text())["known"] == 4
    (log,) = tmp_path.glob("few-answers-distilled-*/log.json")
    assert any("distillation_loss" in entry for entry in json.loads(log.read_text())["log"])
    (log,) = tmp_path.glob("teacher's-distribution-first-half-*/log.json")
    distilled = {entry["step"] for entry in json.loads(log.read_text())["log"] if "distillation_loss" in entry}
    assert distilled == {1}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_distillation(study, range(1), "validation", 4, **asked) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written
