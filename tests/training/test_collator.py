import logging

import pytest
import torch
from training.sft_helpers import conversations, make_trainer, processor_and_model
from transformers.utils import logging as transformers_logging

from voco_llama_hf.training import VoCoDataCollator


@pytest.fixture
def collators():
    processor, model = processor_and_model()
    processor.num_voco_tokens = 3
    plain, always = (
        VoCoDataCollator(processor, assistant_only_loss=True, always_images=always) for always in (False, True)
    )
    return plain, always, model


@pytest.mark.parametrize("options", [{"use_cache": False}, {"two_stages": True}, {"attention_mode": "uncompressed"}])
def test_a_blank_image_is_read_by_nothing_and_gives_everything_a_gradient_of_zero(collators, options):
    plain, always, model = collators
    rows = list(conversations(3, images_per_row=(0,)))
    expected, batch = plain(rows), always(rows)
    assert "pixel_values" not in expected and len(batch["pixel_values"]) == 1
    length = expected["input_ids"].shape[1]
    assert batch["input_ids"].shape[1] == length + 3
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name][:, :length], expected[name])
    assert (batch["labels"][:, length:] == -100).all()
    text = model(**expected, use_cache=False)
    shown = model(**batch, **{"use_cache": False, **options})
    is_text = expected["attention_mask"] == 1
    torch.testing.assert_close(shown.logits[:, :length][is_text], text.logits[is_text], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shown.loss, text.loss)
    shown.loss.backward()
    projector = list(model.model.multi_modal_projector.parameters())
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in projector)


def test_a_batch_with_an_image_gets_no_other(collators):
    plain, always, _ = collators
    rows = list(conversations(3, images_per_row=(0, 1, 0)))
    expected, batch = plain(rows), always(rows)
    assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.fixture
def warnings(caplog):
    transformers_logging.enable_propagation()
    transformers_logging.get_logger("transformers").warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog
    transformers_logging.disable_propagation()


@pytest.mark.parametrize("max_length, is_told", [(12, True), (None, False), (100, False)])
def test_answers_that_are_cut_off_are_told(tmp_path, warnings, max_length, is_told):
    make_trainer(tmp_path, max_length=max_length, max_steps=1).train()
    text = "There are rows from which nothing is learned, 2 of the first batch: max_length=12 may cut off the answers"
    assert (text in warnings.text) == is_told
