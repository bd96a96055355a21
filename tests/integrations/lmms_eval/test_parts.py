"""Parts of the integration that lmms-eval itself is not needed for."""

import json
import random

import pytest
import torch
from PIL import Image

from voco_llama_hf.hub.cost import ImageCost
from voco_llama_hf.hub.results import load_eval_results
from voco_llama_hf.integrations.lmms_eval.answering import Answerer, Question, cut, generation_options
from voco_llama_hf.integrations.lmms_eval.reading import FullReading, make_reading
from voco_llama_hf.integrations.lmms_eval.results import LmmsResults, ReadingScores, TaskInfo, TaskScores
from voco_llama_hf.integrations.lmms_eval.visuals import Visual, as_visual, exchange


# Table 1 of the paper
TASKS = ("gqa", "mmb", "mme", "pope", "seed", "sqa", "vqav2")
TABLE_1 = {
    "upper bound": (61.1, 64.0, 1487.2, 85.0, 57.9, 66.5, 77.7),
    "k=1": (57.0, 58.8, 1323.3, 81.4, 53.7, 65.4, 72.3),
    "lower bound": (37.7, 22.3, 617.3, 53.9, 36.9, 60.7, 41.2),
}


@pytest.fixture
def table_1():
    cost = ImageCost(1, 524_288, 10**12, 10**11)
    readings = {
        name: ReadingScores(
            1 if name == "k=1" else None,
            cost,
            {task: TaskScores({"score": value}, 0.1, 10, 20) for task, value in zip(TASKS, values)},
        )
        for name, values in TABLE_1.items()
    }
    infos = {task: TaskInfo("score", 100, dataset=f"owner/{task}", split="test") for task in TASKS}
    return LmmsResults(infos, readings, "upper bound", "lower bound", "0.7.3")


def test_retention_is_that_of_the_paper(table_1):
    assert 100 * table_1.mean_retention("k=1") == pytest.approx(83.7, abs=0.1)
    results, shares, costs = table_1.sheets()
    assert results.rows[1] == ["k=1", "57.0", "58.8", "1323.3", "81.4", "53.7", "65.4", "72.3", "83.7"]
    assert shares.rows[0][1:3] == ["82.5", "87.5"]
    assert costs.rows[1][:3] == ["k=1", "1", "524 kB"]


def test_files(table_1, tmp_path):
    for name in ("results.json", "results.md", "results.png"):
        (table_1.plot if name.endswith("png") else table_1.save)(tmp_path / name)
    assert json.loads((tmp_path / "results.json").read_text())["retention"]["k=1"]["mean"] == pytest.approx(
        0.837, abs=1e-3
    )
    assert "| k=1 | 57.0 |" in (tmp_path / "results.md").read_text()
    assert Image.open(tmp_path / "results.png").width > 1000
    figures = load_eval_results(tmp_path / "results.json")
    # The bounds are another model's
    assert {(figure.metric_type, figure.metric_args["num_voco_tokens"]) for figure in figures} == {
        ("score", 1),
        ("retention", 1),
    }
    assert {figure.dataset_type for figure in figures} == {f"owner/{task}" for task in TASKS}


def test_bounds_that_do_not_differ(table_1, tmp_path):
    """A task that nobody needs to see for counts for nothing, and JSON has no NaN."""
    for reading in table_1.readings.values():
        reading.tasks["gqa"].metrics["score"] = 50.0
    without = [table_1.retention("k=1", task) for task in TASKS[1:]]
    assert table_1.mean_retention("k=1") == pytest.approx(sum(without) / 6)
    table_1.save(tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text())["retention"]["k=1"]["gqa"] is None
    assert "NaN" not in (tmp_path / "results.json").read_text()


@pytest.mark.parametrize("mode", ["uncompressed", "causal"])
def test_all_vision_tokens(mode, network):
    """Logits of the long sequence, in a batch of rows of other lengths, are those of the model's own single pass."""
    model, processor = network
    images = [[noise(0)], [noise(1), noise(2)], []]
    prompts = ["<image>\nWhat colour is it?\n", "<s>What is in <image> and <image>?\n", "<s>What?\n"]
    reading = FullReading(model, processor, 3, mode)
    encoded = reading.encode(prompts, [[as_visual(image, 8) for image in row] for row in images])
    with torch.no_grad():
        logits = reading.network(**encoded.inputs, logits_to_keep=2).logits
        inputs = processor(
            text=prompts,
            images=[image for row in images for image in row],
            num_voco_tokens=reading.num_voco_tokens,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        expected = model(**inputs, attention_mode=mode, use_cache=False).logits[:, -2:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["voco", "uncompressed", "causal"])
def test_answers_do_not_depend_on_their_batch(mode, network):
    """Questions with no, one and two images and a video, alone and together."""
    kinds = [["image"], [], ["image", "image"], ["video"], ["image"]]
    questions = []
    for i, row in enumerate(kinds):
        shown = [as_visual(noise(i) if kind == "image" else [noise(i), noise(i + 1)], 2) for kind in row]
        content = [*({"type": kind} for kind in row), {"type": "text", "text": "What colour is it?"}]
        questions.append(Question([{"role": "user", "content": content}], shown, " red"))
    alone, together = (Answerer(make_reading(*network, mode, 2, 2**20), size, show_progress=False) for size in (1, 5))
    options = {"max_new_tokens": 6}
    assert list(alone.generate(questions, options)) == list(together.generate(questions, options))
    for one, other in zip(alone.score(questions), together.score(questions), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
    assert together.num_answered == 10
    if mode == "voco":
        assert together.reading.num_read == 5  # the third question shows one image twice


def test_images_are_forgotten_when_there_are_too_many(network):
    reading = make_reading(*network, "voco", 1, max_cache_bytes=2 * 6 * 2 * 2 * 64 * 4)  # of two images
    for seed in (0, 1, 2, 1, 0):
        reading.encode(["<image>\nWhat?\n"], [[as_visual(noise(seed), 1)]])
    assert (reading.num_read, reading.num_reused) == (4, 1)


def noise(seed: int) -> Image.Image:
    values = random.Random(seed).randbytes(64 * 64 * 3)
    return Image.frombytes("RGB", (64, 64), values)


def test_palettes_tell_images_apart():
    """Two images of the same indices and other colours are not the same image."""
    red, blue = (Image.new("P", (8, 8)) for _ in range(2))
    red.putpalette([255, 0, 0])
    blue.putpalette([0, 0, 255])
    assert as_visual(red, 1).key != as_visual(blue, 1).key


@pytest.mark.parametrize("seed", range(20))
def test_exchanged_visuals(seed):
    """As many of each kind, none of them one's own, and the same every time."""
    rng = random.Random(seed)
    docs = [
        [visual(kind, str(rng.randrange(4))) for kind in rng.choice([["image"], ["image", "video"], []])]
        for _ in range(rng.randrange(2, 30))
    ]
    for i, own in enumerate(docs):
        possible = [
            other
            for other in docs
            if kinds_of(other) == kinds_of(own) and not {v.key for v in own} & {v.key for v in other}
        ]
        if own and not possible:
            with pytest.raises(ValueError, match="no other question of the task shows"):
                exchange(own, i, len(docs), docs.__getitem__)
            continue
        other = exchange(own, i, len(docs), docs.__getitem__)
        assert other == exchange(own, i, len(docs), docs.__getitem__)
        assert other in possible if own else other == []


def visual(kind, key):
    return Visual(kind, f"{kind} {key}", list)


def kinds_of(visuals):
    return [one.kind for one in visuals]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"array": [0.0], "sampling_rate": 16000, "type": "audio"},
            "reads images and videos, and this task shows dict",
        ),
        ({"type": "video", "url": "a.mp4", "video_start": 1.0}, "asks about a part of one"),
        (3, "this task shows int"),
    ],
)
def test_what_cannot_be_shown(source, message):
    with pytest.raises(ValueError, match=message):
        as_visual(source, 8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 1024, "num_beams": 1}),
        ({"temperature": 0, "top_p": 1.0, "until": ["\n"]}, {"do_sample": False, "temperature": None, "top_p": None}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True}),
        ({"max_new_tokens": 5000}, {"max_new_tokens": 2000}),
        ({"max_gen_toks": 7, "num_beams": 3}, {"max_new_tokens": 7, "num_beams": 3}),
        ({"image_aspect_ratio": "original", "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ],
)
def test_generation_options(options, expected):
    before = dict(options)
    made = generation_options(options, room=2000)
    assert made.items() >= expected.items()
    assert "until" not in made and "image_aspect_ratio" not in made
    assert options == before  # lmms-eval makes the keys of its cache from them afterwards


def test_cut():
    assert cut("red\n\nASSISTANT: blue", ["ASSISTANT:", "\n\n"]) == "red"
    assert cut(" red ", []) == "red"
