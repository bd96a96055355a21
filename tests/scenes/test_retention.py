import io
import json

import pytest
import torch
from datasets import disable_progress_bars
from rich.console import Console
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.evaluation import ScenesResults
from voco_llama_hf.scenes.readers import preprocess, uncompressed_reader
from voco_llama_hf.scenes.retention.baselines import put_compressor
from voco_llama_hf.scenes.retention.describing import OBJECTS, named
from voco_llama_hf.scenes.retention.following import exact_match
from voco_llama_hf.scenes.retention.report import (
    Comparison,
    make_curves,
    make_rows,
    plot_rows,
    print_rows,
    to_markdown,
)
from voco_llama_hf.scenes.retention.sizes import Size
from voco_llama_hf.scenes.retention.study import Arm, Study, fixed_arm, make_arms, run_study, trace
from voco_llama_hf.scenes.still import DIFFICULTIES, FAMILIES, make_scenes


disable_progress_bars()


@pytest.fixture(scope="module")
def processor():
    return build_processor(RECIPE)


@pytest.mark.parametrize(("compressor", "num_tokens"), [("average pooling", 1), ("q-former", 1), ("q-former", 3)])
def test_a_compressor_makes_few_tokens_of_an_image(processor, compressor, num_tokens):
    model = build_model(processor, RECIPE)
    scenes = make_scenes("validation", 3)
    images = preprocess(processor, scenes)
    before = model.model.get_vision_features(**images)
    put_compressor(model, compressor, num_tokens)
    features = model.model.get_vision_features(**images)
    assert before.shape == (3, 64, 256) and features.shape == (3, num_tokens, 256)
    if compressor == "average pooling":
        # It starts as the mean of what the text model knows
        torch.testing.assert_close(features[:, 0], before.mean(1))

    inputs = processor(images=list(scenes["image"]), text=["<image>\nWhere?\n"] * 3, return_tensors="pt")
    model(**inputs, attention_mode="uncompressed", labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.model.multi_modal_projector.parameters())
    assert all(model.model.vision_tower.embeddings.patch_embedding.weight.grad.flatten() != 0)

    questions = ["Where is the red star?", "How many digits are there?"]
    answers = uncompressed_reader(model.eval(), processor, images)(questions, [2, 0])
    inputs = processor(images=scenes[2]["image"], text=f"<image>\n{questions[0]}\n", return_tensors="pt")
    with torch.no_grad():
        first = model(**inputs, attention_mode="uncompressed").logits[0, -1].argmax()
    assert answers[0].startswith(processor.decode(first, skip_special_tokens=True).strip())


def scores(value: float) -> dict[str, dict[str, float]]:
    return {difficulty: dict.fromkeys((OBJECTS, "all", *FAMILIES), value) for difficulty in DIFFICULTIES}


def results(**accuracy: float) -> ScenesResults:
    by_reading = {name.replace("_", "="): scores(value) for name, value in accuracy.items()}
    return ScenesResults("test", 1, {}, by_reading, {})


RESULTS = {
    "upper bound": [results(causal=0.9, k_1=0.3), results(causal=0.8, k_1=0.2)],
    "q-former": [results(k_1=0.45), results(k_1=0.5)],
    "trained at k=1": [results(k_1=0.6), results(k_1=0.5)],
    "trained at k=2": [results(k_1=0.6, k_2=0.9), results(k_1=0.5, k_2=0.8)],
    "elastic": [results(k_1=0.75, k_2=0.9, uncompressed=0.9), results(k_1=0.8, k_2=0.8, uncompressed=0.8)],
}


def test_retention_is_the_share_between_the_bounds_of_the_same_seed():
    rows = {(row.arm, row.reading): row for row in make_rows(RESULTS, "dense")}
    assert rows["upper bound", "causal"].retention["all"] == pytest.approx([1, 1])
    assert rows["lower bound", "k=1"].retention["all"] == pytest.approx([0, 0])
    assert rows["q-former", "k=1"].retention["all"] == pytest.approx([0.25, 0.5])
    assert rows["elastic", "k=1"].retention["all"] == pytest.approx([0.75, 1])
    assert rows["elastic", "uncompressed"].accuracy["where"] == [0.9, 0.8]


def test_what_few_scenes_do_not_ask_is_no_number():
    few = ScenesResults("test", 1, {}, {mode: {"dense": {"all": 0.5}} for mode in ("causal", "k=1")}, {})
    row = make_rows({"upper bound": [few, few]}, "dense")[0]
    assert row.accuracy["all"] == [0.5, 0.5] and "|  |" in to_markdown([row])


def test_curves_have_a_point_for_each_number_of_tokens():
    curves = make_curves(make_rows(RESULTS, "dense"))
    points = {name: [k for k, _ in points] for name, points in curves.items()}
    assert points == {"q-former": [1], "trained at k=1": [1], "trained at k=2": [1, 2], "elastic": [1, 2]}


def test_the_table_and_the_picture(tmp_path):
    rows = make_rows(RESULTS, "dense")
    console = Console(file=io.StringIO(), width=200)
    print_rows(rows, "some title", console)
    table = console.file.getvalue()
    assert all(word in table for word in ("upper bound", "lower bound", "37.5 ±17.7", "85.0 ±7.1", *FAMILIES))
    head, _, first, *_ = to_markdown(rows).splitlines()
    assert head.startswith("| arm | asked with | objects | retention | questions | retention |") and head.count(
        "|"
    ) == first.count("|")
    assert first.startswith("| upper bound | causal | 85.0 ±7.1 | 100.0 ±0.0 | 85.0 ±7.1 | 100.0 ±0.0 |")
    plot_rows(rows, "some title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_every_arm_of_the_paper_is_there():
    arms = {arm.name: arm for arm in make_arms((1, 2, 16))}
    assert len({arm.folder for arm in arms.values()}) == len(arms) == 7
    assert arms["upper bound"].attention_mode == "causal"
    assert arms["trained at k=1"].read_at == (1,) and arms["trained at k=16"].read_at == (1, 2, 16)
    assert arms["elastic"].num_voco_tokens == (1, 2, 16, 0)


def test_objects_are_named_with_all_that_is_said_of_them():
    true = "large red star top left, small blue 7 center"
    assert named(true, true) == named("small blue 7 center, large red star top left", true) == 1
    assert named("large red star top left, small blue 1 center", true) == 0.5
    assert named("large red star top left", true) == 0.5
    # Naming everything is no way to name all
    assert named(f"{true}, large red star center, small green 3 center", true) == 0.5
    assert named("", true) == 0


def test_exact_match_counts_questions_not_tokens():
    labels = torch.tensor([[-100, -100, 3, 4, -100, 5], [-100, 6, -100, 7, 8, -100]])
    groups = torch.tensor([[0, 1, 1, 1, 2, 2], [0, 1, 2, 2, 2, 0]])
    logits = torch.nn.functional.one_hot(labels.clamp(min=0).roll(-1, 1), 10).float()
    assert exact_match(logits, labels, groups) == 1
    logits[0, 1, 9] = 2  # the first token of the first answer
    assert exact_match(logits, labels, groups) == 0.75
    logits[0, 2, 9] = 2  # and its second
    assert exact_match(logits, labels, groups) == 0.75
    logits[1, 3, 9] = 2
    assert exact_match(logits, labels, groups) == 0.5


@pytest.mark.slow
def test_a_micro_study_runs_end_to_end_and_is_found_again(tmp_path):
    study = Study(tmp_path, Size(RECIPE, steps=2), compile=False)
    said = []
    first = run_study(study, make_arms((1, 2)), range(2), "validation", 4, report=said.append)
    assert len(said) == 1 + 2 * len(make_arms((1, 2)))
    assert set(first["upper bound"][0].accuracy) == {"causal", "k=1"}
    assert set(first["elastic"][1].accuracy) == {"k=1", "k=2", "uncompressed"}
    assert set(first["q-former"][0].accuracy) == {"k=1"}

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = run_study(study, make_arms((1, 2)), range(2), "validation", 4, report=said.append)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == written

    # Asked at other numbers, an arm is trained once, and what is drawn from others anew
    more = run_study(study, make_arms((1, 2, 4)), range(1), "validation", 4, report=said.append)
    assert set(more["trained at k=2"][0].accuracy) == {"k=2"} and set(first["trained at k=2"][0].accuracy) == {
        "k=1",
        "k=2",
    }
    assert set(more["elastic"][0].accuracy) == {"k=1", "k=2", "k=4", "uncompressed"}

    # Seeds differ in what is trained, arms in how
    weights = [study.trained(Arm("elastic", (1, 2, 0)), seed).lm_head.weight for seed in (0, 1)]
    assert not torch.equal(*weights)

    courses = trace(study, make_arms((1, 2)), range(2))
    assert [point.step for point in courses.curves["elastic"][1]] == [1, 2]
    assert all(list(tried) == ["0.001"] for tried in courses.search.values())
    comparison = Comparison("micro", 2, "validation", 4, first, courses)
    comparison.save(tmp_path / "study.json")
    saved = json.loads((tmp_path / "study.json").read_text())
    assert saved["seeds"] == 2 and saved["rows"]["dense"][0]["arm"] == "upper bound"
    comparison.plot(tmp_path / "study.png")
    for name in ("study.png", "study_training.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_what_an_arm_says_is_what_its_trainer_does(tmp_path, processor):
    model = build_model(processor, RECIPE)
    model.save_pretrained(tmp_path)  # the teacher
    study = Study(tmp_path, Size(RECIPE, steps=2), trained_base=tmp_path, compile=False)
    study.processor = processor
    arm = Arm("some", (1, 2, 0), distillation_weight=0.25, distillation_temperature=2.0, draws=2)
    trainer = study._trainer(model, arm, RECIPE, study._phase(arm, "some", 1e-3))
    args = trainer.args
    assert (args.distillation_weight, args.distillation_temperature, args.num_voco_tokens) == (0.25, 2.0, [1, 2, 0])
    assert (args.draws_per_step, args.two_stages) == (2, True)
    assert (args.learning_rate, args.max_steps) == (1e-3, 2)


@pytest.mark.slow
def test_the_learning_rate_that_reads_validation_best_is_taken(tmp_path):
    study = Study(tmp_path, Size(RECIPE, steps=2, learning_rates=(1e-3, 1e-4)), compile=False)
    study.prepare()
    arm = fixed_arm(1)
    tried = {rate: study.curve(arm, 0, rate)[-1].exact_match for rate in (1e-3, 1e-4)}
    assert tried[study.learning_rate(arm)] == max(tried.values())
    study.trained(arm, 1)
    folders = [path.name for path in tmp_path.glob("trained-at-k=1-*-final")]
    assert len(folders) == 3 and f"trained-at-k=1-2-steps-at-{study.learning_rate(arm):g}-seed-1-final" in folders
