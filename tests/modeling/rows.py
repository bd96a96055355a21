"""Random batches of text and images for hypothesis."""

import torch
from hypothesis import strategies as st
from modeling.reference import Image


@st.composite
def layouts(draw, min_images: int = 1):
    """Batches of 1 to 3 rows with 0 to 4 images a row, any k, and text before, between and after."""
    text = st.lists(st.integers(14, 120), min_size=1, max_size=4)
    image = st.integers(1, 5)
    rows = draw(
        st.lists(
            st.lists(st.one_of(text, image), min_size=1, max_size=6).filter(
                lambda parts: sum(isinstance(part, int) for part in parts) <= 4
            ),
            min_size=1,
            max_size=3,
        ).filter(lambda rows: sum(isinstance(part, int) for row in rows for part in row) >= min_images)
    )
    numbers = iter(range(100))
    return [[Image(next(numbers), part) if isinstance(part, int) else part for part in row] for row in rows]


def num_images(rows) -> int:
    return sum(isinstance(part, Image) for row in rows for part in row)


def logits_by_row(output, batch) -> list[torch.Tensor]:
    return [row[mask.bool()] for row, mask in zip(output.logits, batch["attention_mask"])]
