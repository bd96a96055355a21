"""torch.compile: of everything, of single layers as accelerate and vLLM do, and of a step of training."""

import pytest
import torch
from modeling.helpers import random_inputs, tiny_model
from torch._dynamo.testing import CompileCounter


LAYOUT = [["text:3", "image:2", "text:4"], ["image:2", "text:5"]]
NUM_LAYERS = 10  # more than the 8 times that torch compiles one function


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def count_compilations(num_layers: int) -> int:
    """How often parts of layers, compiled one by one, are compiled to compress and to read."""
    torch._dynamo.reset()
    model = tiny_model(text={"num_hidden_layers": num_layers})
    inputs = random_inputs(model, LAYOUT)
    expected = model.compress(inputs["pixel_values"], 2), model(**inputs, use_cache=True).logits
    model = tiny_model(text={"num_hidden_layers": num_layers})  # one that has done nothing yet
    counter = CompileCounter()
    for layer in model.model.language_model.layers:
        layer.compile(backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        torch.testing.assert_close(model.compress(inputs["pixel_values"], 2).keys, expected[0].keys)
        torch.testing.assert_close(model(**inputs, use_cache=True).logits, expected[1], rtol=1e-4, atol=1e-4)
    return counter.frame_count


def test_layers_compiled_one_by_one_are_compiled_once():
    """A layer is the same function whatever its number."""
    assert count_compilations(3) == count_compilations(NUM_LAYERS)


@torch.no_grad()
def test_a_compiled_language_model_compresses_in_one_graph():
    model = tiny_model(text={"num_hidden_layers": NUM_LAYERS})
    pixels = random_inputs(model, LAYOUT)["pixel_values"]
    expected = model.compress(pixels, 2)
    counter = CompileCounter()
    model.model.language_model.compile(backend=counter)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            torch.testing.assert_close(model.compress(pixels, 2).keys, expected.keys)
    assert counter.frame_count == 1


def test_a_step_of_training_breaks_where_its_layout_is_found_out():
    """That depends on the content of a batch: what is compiled is the part in front of it and the one behind."""
    model = tiny_model().train()
    inputs = random_inputs(model, LAYOUT)
    inputs["labels"] = inputs["input_ids"].clone()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="eager")
    again = compiled(**inputs, use_cache=False).loss
    again.backward()
    torch.testing.assert_close(again, loss)
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-4)
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert len(reasons) == 1 and "lay_out" in next(iter(reasons))
