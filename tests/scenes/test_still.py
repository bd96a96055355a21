import numpy as np
import pytest
from datasets import disable_progress_bars
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_llama_hf.scenes.canvas import LARGE, MINI, SMALL, TILES
from voco_llama_hf.scenes.objects import COLOURS, SHAPES, glyphs
from voco_llama_hf.scenes.still import FAMILIES, QUESTIONS, SPLITS, make_scene, make_scenes


disable_progress_bars()
scene_indices = st.integers(0, 10**6)
canvases = st.sampled_from([MINI, SMALL, LARGE, TILES])


def content(dataset):
    """Everything in a data set, images as their encoded bytes."""
    return dataset.with_format("arrow")[:].to_pydict()


def described(scene, canvas=SMALL):
    """The objects of a scene as plain facts, worked out without the module's own question code."""
    return [
        {
            "colour": o["colour"],
            "name": o["name"],
            "phrase": f"{o['colour']} {o['name']}",
            "size": o["size"],
            "row": o["cell"] // canvas.grid,
            "column": o["cell"] % canvas.grid,
            "position": canvas.positions[o["cell"]],
        }
        for o in scene["objects"]
    ]


def only(objects, key, value):
    found = [o for o in objects if o[key] == value]
    assert len(found) == 1, f"{value} is not unique"
    return found[0]


def find_phrase(objects, words):
    return only(objects, "phrase", words)


def true_answer(question, objects):
    """Answers a question from the objects by reading its words."""
    words = question.rstrip("?").split()
    digits = [o for o in objects if o["name"].isdigit()]
    shapes = [o for o in objects if not o["name"].isdigit()]
    if words[:2] == ["How", "many"]:
        noun = words[2:-2][-1]
        kind = words[2] if noun == "objects" else None
        if noun == "objects":
            return str(sum(kind in ("objects", o["colour"], o["size"]) for o in objects))
        if noun == "digits":
            return str(len(digits))
        return str(sum(noun in (f"{o['name']}s", f"{o['name']}es") for o in objects))
    if words[:3] == ["Is", "there", "a"]:
        return "yes" if any(o["phrase"] == " ".join(words[3:]) for o in objects) else "no"
    if words[0] == "Is":
        for relation in ("left of", "above", "larger than"):
            first, found, second = " ".join(words[2:]).partition(f" {relation} the ")
            if found:
                a, b = find_phrase(objects, first), find_phrase(objects, second)
                if relation == "left of":
                    assert a["column"] != b["column"]
                    return "yes" if a["column"] < b["column"] else "no"
                if relation == "above":
                    assert a["row"] != b["row"]
                    return "yes" if a["row"] < b["row"] else "no"
                assert a["size"] != b["size"]
                return "yes" if a["size"] == "large" else "no"
    if words[0] == "Where":
        rest = words[3:]
        if rest[-1] == "object":
            return only(objects, "colour", rest[0])["position"]
        return only(objects, "name" if len(rest) == 1 else "phrase", " ".join(rest))["position"]
    assert words[0] == "What"
    pool = {"colour": objects, "shape": shapes, "digit": digits}[words[1]]
    wanted = "colour" if words[1] == "colour" else "name"
    if words[2:4] == ["is", "at"]:
        return only(pool, "position", " ".join(words[4:]).removeprefix("the "))[wanted]
    if words[2:4] == ["is", "the"]:
        return only(pool, "name", words[4])[wanted]
    return only(pool, "colour", words[3])[wanted]


@pytest.fixture(scope="module")
def validation():
    return make_scenes("validation", 600)


def test_same_seed_gives_the_same_bytes_whatever_the_number_of_processes():
    first = content(make_scenes("train", 40, seed=3))
    assert content(make_scenes("train", 40, seed=3)) == first
    assert content(make_scenes("train", 40, seed=3, num_proc=2)) == first
    assert content(make_scenes("train", 40, seed=4)) != first


def test_a_row_does_not_depend_on_the_number_of_rows():
    assert content(make_scenes("test", 5)) == content(make_scenes("test", 9).select(range(5)))


def test_splits_share_neither_images_nor_digits():
    images = {s: {row["bytes"] for row in content(make_scenes(s, 60))["image"]} for s in SPLITS}
    digits = {s: {glyph.tobytes() for glyph in glyphs(s)[0]} for s in SPLITS}
    for split, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not images[split] & images[other]
        assert not digits[split] & digits[other]
    assert sum(map(len, digits.values())) == 1797
    assert all(set(glyphs(split)[1]) == set(range(10)) for split in SPLITS)


@given(index=scene_indices, dense=st.booleans(), canvas=canvases)
@settings(max_examples=60, deadline=None)
def test_objects_lie_on_the_canvas_and_apart(index, dense, canvas):
    scene = make_scene("train", index, dense_share=float(dense), canvas=canvas)
    low, high = canvas.difficulties["dense" if dense else "sparse"]
    covered = np.zeros((canvas.side, canvas.side), dtype=int)
    for o in scene["objects"]:
        assert 0 <= o["left"] <= canvas.side - o["pixels"] and 0 <= o["top"] <= canvas.side - o["pixels"]
        covered[o["top"] : o["top"] + o["pixels"], o["left"] : o["left"] + o["pixels"]] += 1
    assert covered.max() == 1
    assert low <= len(scene["objects"]) <= high


@given(index=scene_indices, split=st.sampled_from(SPLITS), canvas=canvases)
@settings(max_examples=60, deadline=None)
def test_answers_are_true(index, split, canvas):
    scene = make_scene(split, index, canvas=canvas)
    objects = described(scene, canvas)
    for question, answer in zip(scene["questions"], scene["answers"]):
        assert true_answer(question, objects) == answer, question


@given(index=scene_indices, canvas=canvases)
@settings(max_examples=60, deadline=None)
def test_every_possible_question_has_one_answer(index, canvas):
    scene = make_scene("train", index, dense_share=0.7, questions_per_scene=20, canvas=canvas)
    assert len(set(scene["questions"])) == 20
    for question, answer in zip(scene["questions"], scene["answers"]):
        assert true_answer(question, described(scene, canvas)) == answer, question


@given(index=scene_indices, canvas=canvases)
@settings(max_examples=40, deadline=None)
def test_pixels_show_the_colour_and_place_of_every_object(index, canvas):
    scene = make_scene("train", index, canvas=canvas)
    pixels = np.asarray(scene["image"]).astype(int)
    background = pixels[0, 0]
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    seen = np.zeros((canvas.side, canvas.side), dtype=bool)
    for o in scene["objects"]:
        box = (slice(o["top"], o["top"] + o["pixels"]), slice(o["left"], o["left"] + o["pixels"]))
        crop = pixels[box].reshape(-1, 3)
        strongest = crop[np.abs(crop - background).sum(-1).argmax()]
        middle = pixels[o["top"] + o["pixels"] // 2, o["left"] + o["pixels"] // 2]
        shown = middle if o["name"] in SHAPES else strongest
        assert names[np.abs(palette - shown).sum(-1).argmin()] == o["colour"]
        seen[box] = True
    assert (pixels[~seen] == background).all()


def test_conversations_repeat_questions_and_answers_in_turn(validation):
    for row in validation.select(range(20)):
        users = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
        assistants = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * len(users)
        assert users == row["questions"]
        assert assistants == row["answers"]
        assert len(row["families"]) == len(row["questions"]) == 7


@given(index=scene_indices, canvas=canvases)
@settings(max_examples=30, deadline=None)
def test_description_names_every_object_in_order(index, canvas):
    scene = make_scene("train", index, canvas=canvas)
    told = scene["description"].split(", ")
    assert told == [f"{o['size']} {o['phrase']} {o['position']}" for o in described(scene, canvas)]
    assert [o["cell"] for o in scene["objects"]] == sorted({o["cell"] for o in scene["objects"]})


@pytest.mark.parametrize("index", range(3))
def test_a_scene_is_asked_all_there_is_and_no_more(index):
    scene = make_scene("train", index, questions_per_scene=10_000, dense_share=0.0)
    assert 40 < len(scene["questions"]) == len(set(scene["questions"])) < 1000


def test_families_are_those_of_the_question_makers():
    assert tuple(QUESTIONS) == FAMILIES


def test_guessing_blind_scores_low(validation):
    """The best constant answer to each form of question, chosen with the answers known, stays far below reading."""
    answers = {}
    for row in validation:
        for family, question, answer in zip(row["families"], row["questions"], row["answers"]):
            form = (row["difficulty"], family, question.split()[1 if family == "count" else 0])
            answers.setdefault(form, []).append(answer)
    best = {form: max(map(given_.count, set(given_))) for form, given_ in answers.items()}
    total = sum(map(len, answers.values()))
    assert sum(best.values()) / total < 0.4
    for (_, family, _), given_ in answers.items():
        if family in ("existence", "comparison"):
            assert abs(given_.count("yes") / len(given_) - 0.5) < 0.12


def test_both_difficulties_and_all_families_are_asked(validation):
    dense = sum(name == "dense" for name in validation["difficulty"])
    assert 0.4 < dense / len(validation) < 0.6
    asked = [family for families in validation["families"] for family in families]
    assert all(0.08 < asked.count(family) / len(asked) < 0.2 for family in FAMILIES)
