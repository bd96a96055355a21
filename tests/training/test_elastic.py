import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_llama_hf.training.elastic import draw_num_voco_tokens, draw_several, keep_voco_tokens, repeat_rows


VOCO, PAD = 1, 0


def write_row(images, texts):
    """A row as a list: before image i stand `texts[i]` text tokens, numbered, and behind the last one the rest."""
    row, numbers = [], itertools.count(10)
    for text, count in itertools.zip_longest(texts, images, fillvalue=0):
        row += [*itertools.islice(numbers, text), *[VOCO] * count]
    return row


def pad(rows, value):
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def make_batch(rows, counts):
    return {
        "input_ids": pad(rows, PAD),
        "attention_mask": pad([[1] * len(row) for row in rows], 0),
        "labels": pad([[-100 if token == VOCO else token for token in row] for row in rows], -100),
        "num_voco_tokens": torch.tensor(counts),
        "pixel_values": torch.randn(len(counts), 2),
    }


layouts = st.lists(
    st.integers(0, 3).flatmap(lambda n: st.lists(st.integers(1, 4), min_size=n + 1, max_size=n + 1)),
    min_size=1,
    max_size=4,
).filter(lambda rows: any(len(row) > 1 for row in rows))


@given(layouts, st.integers(1, 5), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_a_batch_cut_down_is_the_batch_made_with_fewer(rows, kept, more):
    widest = kept + more
    num_images = sum(len(texts) - 1 for texts in rows)

    def build(k):
        return make_batch([write_row([k] * (len(texts) - 1), texts) for texts in rows], [k] * num_images)

    wide, narrow = build(widest), build(kept)
    short = keep_voco_tokens(wide, kept, VOCO, PAD)
    assert short["pixel_values"] is wide["pixel_values"]
    for name in ("input_ids", "attention_mask", "labels", "num_voco_tokens"):
        assert torch.equal(short[name], narrow[name]), name


def test_more_tokens_than_collated_are_refused():
    batch = make_batch([write_row([2], [1, 1])], [2])
    with pytest.raises(ValueError, match="2 VoCo tokens an image, fewer than the 3"):
        keep_voco_tokens(batch, 3, VOCO, PAD)


def test_draws_depend_on_seed_and_step_alone():
    draws = [draw_num_voco_tokens([1, 2, 2, 0], seed=3, step=step) for step in range(400)]
    assert draws == [draw_num_voco_tokens([1, 2, 2, 0], seed=3, step=step) for step in range(400)]
    assert draws != [draw_num_voco_tokens([1, 2, 2, 0], seed=4, step=step) for step in range(400)]
    assert set(draws) == {0, 1, 2} and 150 < draws.count(2) < 250


@given(layouts, st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True))
@settings(max_examples=50, deadline=None)
def test_repeated_rows_are_those_made_with_each_number(rows, numbers):
    num_images = sum(len(texts) - 1 for texts in rows)

    def build(k):
        return make_batch([write_row([k] * (len(texts) - 1), texts) for texts in rows], [k] * num_images)

    batch = build(max(numbers))
    repeated = repeat_rows(batch, numbers, VOCO, PAD)
    assert repeated["pixel_values"] is batch["pixel_values"]
    assert repeated["image_indices"].tolist() == list(range(num_images)) * len(numbers)
    assert repeated["num_voco_tokens"].tolist() == [k for k in numbers for _ in range(num_images)]
    for place, k in enumerate(numbers):
        part, own = slice(place * len(rows), (place + 1) * len(rows)), build(k)
        length = own["input_ids"].shape[1]
        for name, padding in (("input_ids", PAD), ("attention_mask", 0), ("labels", -100)):
            assert torch.equal(repeated[name][part, :length], own[name]), name
            assert (repeated[name][part, length:] == padding).all()


def test_several_draws_differ_and_begin_with_the_only_one():
    choices = [1, 1, 1, 2, 4, 0]
    for step in range(200):
        drawn = draw_several(choices, 3, step, 2)
        assert drawn[0] == draw_num_voco_tokens(choices, 3, step)
        assert drawn == [0] or (len(set(drawn)) == 2 and 0 not in drawn)
        assert draw_several(choices, 3, step, 1) == drawn[:1]
