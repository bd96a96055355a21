import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from voco_llama_hf.training.sampling import ModalityLengthSampler


def table(lengths, modalities):
    return Dataset.from_dict({"length": lengths, "modality": modalities})


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 2)), min_size=1, max_size=60),
    st.integers(1, 7),
    st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_every_row_is_drawn_once_and_whole_steps_are_of_one_modality(rows, step_size, epoch):
    lengths, modalities = map(list, zip(*rows, strict=True))
    sampler = ModalityLengthSampler(table(lengths, modalities), step_size, seed=0)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(rows))) and len(sampler) == len(rows)
    num_steps = sum(modalities.count(kind) // step_size for kind in range(3))
    steps = np.array(order[: num_steps * step_size]).reshape(num_steps, step_size)
    assert all(len({modalities[row] for row in step}) == 1 for step in steps)


def test_rows_of_a_step_are_about_as_long_and_epochs_differ():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 1000, 4000)
    data = table(lengths, rng.integers(0, 2, 4000))
    sampler = ModalityLengthSampler(data, 16, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != list(ModalityLengthSampler(data, 16, seed=4))
    steps = lengths[orders[0][: 4000 // 16 * 16 - 32]].reshape(-1, 16)
    padded = (steps.max(1) * 16).sum() / steps.sum()
    assert padded < 1.1, "drawn at random it is 1.8"
    # The steps themselves are in no order of length
    assert abs(np.corrcoef(steps.mean(1), np.arange(len(steps)))[0, 1]) < 0.2


def test_columns_that_are_missing_are_named():
    with pytest.raises(ValueError, match="there is no length and no modality"):
        ModalityLengthSampler(Dataset.from_dict({"messages": ["a"]}), 2, seed=0)
