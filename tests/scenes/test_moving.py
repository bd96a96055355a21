import numpy as np
import pytest
import torch
from scenes.recipe import RECIPE

from voco_llama_hf.scenes.building import build_model, build_processor
from voco_llama_hf.scenes.canvas import LARGE, SMALL
from voco_llama_hf.scenes.moving import (
    ABSENT_FRAMES,
    BOX,
    CHANCE,
    NUM_FRAMES,
    STILL,
    TEMPORAL_FAMILIES,
    TEMPORAL_QUESTIONS,
    blink_patterns,
    describe,
    make_clip,
    make_clips,
    sample_clip,
)
from voco_llama_hf.scenes.video_evaluation import (
    ALL_FRAMES,
    ONE_FRAME,
    OUT_OF_ORDER,
    TEMPORAL,
    chance,
    choose_frames,
    evaluate_videos,
)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def difference(frame, other) -> int:
    return int((np.asarray(frame, int) != np.asarray(other, int)).any(-1).sum())


def test_a_clip_depends_on_its_arguments_alone():
    row, again, other = make_clip("train", 3), make_clip("train", 3), make_clip("test", 3)
    assert [frame.tobytes() for frame in row["images"]] == [frame.tobytes() for frame in again["images"]]
    assert row["messages"] == again["messages"] != other["messages"]
    assert len(row["images"]) == NUM_FRAMES and all(frame.size == (64, 64) for frame in row["images"])


def test_rows_ask_one_question_a_family_and_tell_them_all():
    for row in make_clips("validation", 30):
        assert len(set(row["families"])) == len(row["families"]) >= 2
        asked, answered = ([turn["content"] for turn in row["messages"][start::2]] for start in (0, 1))
        assert len(set(asked)) == len(asked) > len(row["questions"])
        told = dict(zip(asked, answered, strict=True))
        assert all(told[asked] == answer for asked, answer in zip(row["questions"], row["answers"], strict=True))


@pytest.mark.parametrize("family", TEMPORAL_FAMILIES)
def test_every_answer_to_a_question_is_as_frequent(family):
    told = []
    for seed in range(1200):
        for question, answer in TEMPORAL_QUESTIONS[family](sample_clip(rng(seed))):
            if family in ("order", "hiding"):
                answer = "former" if question.index(answer) < question.index(" or the ") else "latter"
            told.append(answer)
    shares = np.array([told.count(answer) for answer in set(told)]) / len(told)
    # One of two directions is asked for, of two pairs
    assert abs(shares - (CHANCE[family] / 2 if family == "direction" else CHANCE[family])).max() < 0.06


def test_forwards_and_backwards_are_as_likely():
    """First and last places of what moves, and the times of what comes, are drawn alike in both directions."""
    moving = [actor for seed in range(800) for actor in sample_clip(rng(seed)).actors if actor.direction]
    starts_low = [actor.path[0].sum() < actor.path[-1].sum() for actor in moving]
    assert abs(np.mean(starts_low) - 0.5) < 0.06
    pairs = [clip.coming for clip in (sample_clip(rng(seed)) for seed in range(800)) if clip.coming]
    seen = np.array([[[i not in actor.away for i in range(NUM_FRAMES)] for actor in pair] for pair in pairs]).mean(0)
    assert abs(seen[0] - seen[1, ::-1]).max() < 0.08


def test_a_blinking_object_is_away_equally_long_however_often_it_blinks():
    for blinks in (1, 2, 3):
        for away in blink_patterns(blinks):
            gone = "".join("x" if i in away else "." for i in range(NUM_FRAMES))
            assert len(away) == ABSENT_FRAMES and gone[0] == gone[-1] == "."
            assert sum(run != "" for run in gone.split(".")) == blinks


def test_the_description_tells_every_frame():
    """What is asked can be read off the description."""
    for seed in range(200):
        clip = sample_clip(rng(seed))
        told = {" ".join(words[:2]): words[2:] for words in (part.split() for part in describe(clip).split(", "))}
        assert all(len(states) == NUM_FRAMES for states in told.values()) and len(told) == len(clip.actors)
        for actor in clip.actors:
            states = told[actor.phrase]
            if actor.direction:
                ends = {"left": "right left", "right": "left right", "up": "bottom top", "down": "top bottom"}
                assert f"{states[0]} {states[-1]}" == ends[actor.direction]
                is_slow_at_first = states.count(states[0]) > states.count(states[-1])
                assert is_slow_at_first == (actor.change == "speed up")
            if actor.blinks:
                assert " ".join(states).count("there gone") == actor.blinks
        for pair, word in ((clip.coming, "there"), (clip.hidden, "hidden")):
            if pair:
                assert told[pair[0].phrase].index(word) < told[pair[1].phrase].index(word)


def test_where_all_blink_each_is_asked_about():
    told = []
    for index in range(60):
        row = make_clip("train", index, blinking=1.0)
        states = {" ".join(part.split()[:2]): part for part in row["description"].split(", ")}
        turns = [turn["content"] for turn in row["messages"]]
        for phrase, state in states.items():
            told.append(turns[turns.index(f"How many times does the {phrase} blink?") + 1])
            assert state.count("there gone") == int(told[-1])
        assert 3 <= len(states) <= 5
    assert min(told.count(answer) for answer in "123") > len(told) / 5
    some = [make_clip("train", index, blinking=0.5)["families"] for index in range(60)]
    assert 15 < sum(families == ["blinks", STILL] for families in some) < 45


@pytest.mark.parametrize("canvas", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("seed", range(40))
def test_objects_keep_apart_and_inside(seed, canvas):
    clip = sample_clip(rng(seed), canvas)
    for i in range(NUM_FRAMES):
        boxes = [(*actor.path[i], *(actor.path[i] + actor.pixels)) for actor in clip.actors]
        for n, (left, top, right, bottom) in enumerate(boxes):
            assert left >= 0 and top >= 0 and right <= canvas.side and bottom <= canvas.side
            for other in boxes[:n]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
        assert sum(i in actor.covered for actor in clip.actors) <= 1
        assert sum(i not in actor.away for actor in clip.coming) <= 1


def test_what_is_asked_about_is_seen():
    """The frames, looked at as pixels, say what the answers say."""
    seen = set()
    for i in range(60):
        row = make_clip("train", i)
        asked = dict(zip(row["families"], row["answers"], strict=True))
        frames = [np.asarray(frame, int) for frame in row["images"]]
        if set(asked) <= {"hiding", "order", STILL}:
            changed = [i for i in range(1, NUM_FRAMES) if difference(frames[i - 1], frames[i])]
            assert 2 <= len(changed) <= 8
            seen.add("nothing moves")
        if "hiding" in asked:
            covers = [(frame == BOX).all(-1).any() for frame in frames]
            assert sum(covers) == 4
            seen.add("hiding")
        if "direction" in asked and "speed" in asked and "blinks" not in asked and len(asked) == 3:
            steps = [difference(frames[i - 1], frames[i]) for i in range(1, NUM_FRAMES)]
            assert (steps[-1] > steps[0]) == (asked["speed"] == "speed up")
            seen.add("speed")
    assert {"hiding", "nothing moves"} <= seen


def test_frames_are_shown_in_order_one_or_out_of_order():
    shown = choose_frames(50, seed=0)
    assert shown[ALL_FRAMES][1] == list(range(NUM_FRAMES, 2 * NUM_FRAMES))
    assert all(sorted(frames) == in_order for frames, in_order in zip(shown[OUT_OF_ORDER], shown[ALL_FRAMES]))
    assert all(frame in in_order for (frame,), in_order in zip(shown[ONE_FRAME], shown[ALL_FRAMES]))
    assert len({frame % NUM_FRAMES for (frame,) in shown[ONE_FRAME]}) == NUM_FRAMES


def test_evaluation_of_a_model_that_knows_nothing(tmp_path):
    processor = build_processor(RECIPE)
    model = build_model(processor, RECIPE).eval()
    torch.manual_seed(0)
    results = evaluate_videos(model, processor, "validation", (1, 2), limit=6, progress=False)
    assert set(results.accuracy) == {"k=1", "k=2"}
    assert set(results.accuracy["k=1"]) == {ALL_FRAMES, ONE_FRAME, OUT_OF_ORDER}
    assert results.num_questions[TEMPORAL] == sum(results.num_questions[family] for family in TEMPORAL_FAMILIES)
    assert 0 <= results.accuracy["k=2"][ALL_FRAMES][TEMPORAL] < 0.5
    assert 1 / 3 <= chance(results)[TEMPORAL] <= 1 / 2
    results.print()
    results.plot(tmp_path / "plot.png")
    results.save(tmp_path / "results.json")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
