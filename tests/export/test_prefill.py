"""Stages of a prompt with images, against a decoder in plain Python that shows what it was given."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_llama_hf.export.prefill import move_columns, number_stages, prefill


PAD, TEXT, IMAGE = 0, 1, 2


@st.composite
def batches(draw):
    """Rows of padding, text and images, with a past: every row has text, and padding stands left of it."""
    length, past = draw(st.integers(1, 9)), draw(st.integers(0, 4))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        padding = draw(st.integers(0, length - 1))
        kinds = draw(st.lists(st.sampled_from([TEXT, IMAGE]), min_size=length - padding, max_size=length - padding))
        rows.append([PAD] * padding + kinds[:-1] + [TEXT])
    past_mask = [[draw(st.booleans()) for _ in range(past)] for _ in rows]
    return torch.tensor(rows), torch.tensor(past_mask, dtype=torch.bool).view(len(rows), past)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_every_token_reads_what_precedes_it(batch):
    """The decoder returns the sum of the keys it may read: those of all tokens before, in order, and no others."""
    kinds, past_mask = batch
    batch_size = len(kinds)
    mask = torch.cat([past_mask, kinds != PAD], dim=1)
    number = 2.0 ** torch.arange(batch_size * mask.shape[1], dtype=torch.double).view(batch_size, -1)
    # A token is its number, which sums cannot hide
    ids = torch.arange(batch_size * mask.shape[1]).view(batch_size, -1)
    calls = []

    def decode(input_ids, attention_mask, position_ids, past):
        calls.append(input_ids.shape)
        new = number.flatten()[position_ids] * attention_mask[:, past[0][0].shape[2] :]
        keys = torch.cat([past[0][0], new[:, None, :, None]], dim=2)
        read = (keys[:, 0, :, 0] * attention_mask).cumsum(1)[:, -input_ids.shape[1] :]
        return read[..., None], [(keys, -keys)]

    new_ids = ids[:, past_mask.shape[1] :]
    voco = kinds == IMAGE
    past_keys = number[:, None, : past_mask.shape[1], None]
    images = number[:, past_mask.shape[1] :][voco]
    images = torch.stack([images, -images])[:, None, :, None, None]
    logits, present = prefill(decode, new_ids, mask.long(), new_ids, [(past_keys, -past_keys)], voco, images)

    expected = (number * mask).cumsum(1)[:, past_mask.shape[1] :]
    text = kinds == TEXT
    torch.testing.assert_close(logits[..., 0][text], expected[text])
    assert (logits[~text] == 0).all()
    keys, values = present[0]
    torch.testing.assert_close(keys[:, 0, :, 0][mask], number[mask])
    torch.testing.assert_close(values, -keys)
    assert len(calls) == max(len(runs_of_text(row)) for row in kinds.tolist())


def runs_of_text(row: list[int]) -> list[int]:
    kinds = [kind for kind in row if kind != PAD]
    return [i for i, kind in enumerate(kinds) if kind == TEXT and (i == 0 or kinds[i - 1] == IMAGE)]


def test_images_first_is_one_stage():
    voco = torch.tensor([[0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]], dtype=torch.bool)
    text = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert number_stages(voco, text).max() == 0
    assert number_stages(text, voco).max() == 1


def test_columns_that_are_in_place_are_not_copied():
    states = [(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))]
    mask = torch.tensor([[True, True, True], [False, True, True]])
    assert move_columns(states, mask, mask) is states
