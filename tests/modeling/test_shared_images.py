"""One image in several places of a batch is computed as if there were several equal ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import TILED, random_images, random_inputs, random_pixels, tiny_model


TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
WAYS = [("voco", True), ("voco", False), ("uncompressed", None), ("causal", None)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@st.composite
def batches(draw):
    """Rows as `random_inputs` takes them, and which image stands in each place."""
    rows = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
    layouts = [[part for count in row for part in (f"text:{count % 3 + 1}", f"image:{count}")] for row in rows]
    num_places = sum(map(len, rows))
    images = draw(st.permutations(range(num_places)))
    num_images = draw(st.integers(1, num_places))
    return [[*layout, "text:2"] for layout in layouts], [image % num_images for image in images]


@given(batches(), st.sampled_from(WAYS))
@settings(max_examples=40, deadline=None)
def test_places_share_images(model, batch, way):
    layouts, places = batch
    (mode, two_stages), indices = way, torch.tensor(places)
    inputs = random_inputs(model, layouts)
    inputs["pixel_values"] = random_pixels(model, max(places) + 1)
    options = {"attention_mode": mode, "two_stages": two_stages, "use_cache": False}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for images in (
        {"image_indices": places},
        {"pixel_values": inputs["pixel_values"][indices]},
    ):
        model.zero_grad()
        outputs = model(**{**inputs, **images}, **options, labels=labels)
        outputs.loss.backward()
        found.append(
            (outputs.logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (logits, gradients), (expected, wanted) = found
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], expected[seen], **TOLERANCE)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("two_stages", [True, False])
@torch.no_grad()
def test_large_images_are_shared(kind, two_stages):
    model = tiny_model(**TILED[kind])
    images = random_images(model, [(28, 56), (84, 84)])
    indices = torch.tensor([1, 0, 1])
    inputs = random_inputs(model, [["image:3", "text:2", "image:1"], ["image:2", "text:4"]])
    inputs |= {"two_stages": two_stages, "use_cache": False}
    shared = model(**{**inputs, **images}, image_indices=indices).logits
    repeated = model(**{**inputs, **{name: tensor[indices] for name, tensor in images.items()}}).logits
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(shared[seen], repeated[seen], **TOLERANCE)


@torch.no_grad()
def test_an_image_is_compressed_once_for_all_of_its_places(model):
    inputs = random_inputs(model, [["image:1", "text:2"], ["image:4", "text:2"], ["image:2", "text:2"]])
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    lengths = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[:2]), with_kwargs=True
    )
    model(**inputs, image_indices=torch.tensor([0, 0, 0]), two_stages=True)
    hook.remove()
    # <s>, four vision tokens, a line break and the four VoCo tokens of the place that has most
    assert lengths[0] == (1, 10) and len(lengths) == 2


@pytest.mark.parametrize("indices", [[0, 1, 2], [0, 0, 0], [0, -1, 1]])
@pytest.mark.parametrize("two_stages", [True, False])
def test_indices_of_no_image_or_not_of_all(model, indices, two_stages):
    inputs = random_inputs(model, [["image:1", "text:2"]] * 3)
    inputs["pixel_values"] = inputs["pixel_values"][:2]
    with pytest.raises(ValueError, match="image_indices must name each of the 2 images of pixel_values"):
        model(**inputs, image_indices=torch.tensor(indices), two_stages=two_stages, use_cache=False)


@pytest.mark.parametrize("indices", [torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]), torch.tensor([True, False])])
def test_indices_that_are_no_vector_of_integers(model, indices):
    inputs = random_inputs(model, [["image:1", "text:2"]] * 2)
    with pytest.raises(ValueError, match="image_indices must be a vector of integers"):
        model(**inputs, image_indices=indices)


def test_indices_without_pixels(model):
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="image_indices are those of pixel_values"):
        model(input_ids=ids, image_indices=torch.tensor([0]))


def test_a_generation_about_one_image_takes_its_cache_several_times(model):
    inputs = random_inputs(model, [["image:2", "text:3"], ["image:2", "text:4"]])
    pixels = inputs.pop("pixel_values")[:1]
    indices = torch.tensor([0, 0])
    with pytest.raises(ValueError, match=r"voco_cache=cache\[indices\]"):
        model.generate(**inputs, pixel_values=pixels, image_indices=indices, max_new_tokens=3)
    shared = model.generate(**inputs, voco_cache=model.compress(pixels, 2)[indices], max_new_tokens=3)
    repeated = model.generate(**inputs, pixel_values=pixels[indices], max_new_tokens=3)
    assert torch.equal(shared, repeated)
