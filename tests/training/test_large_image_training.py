"""Training on images that are divided into tiles, each with vision tokens of its own number."""

import pytest
import torch
from datasets import disable_progress_bars
from modeling.helpers import TILED, build_processor
from training.sft_helpers import build_model, config, conversations, losses

from voco_llama_hf.llava import as_llava
from voco_llama_hf.training import VoCoSFTTrainer


disable_progress_bars()


def train(tmp_path, kind, **options):
    processor = build_processor(kind)
    model = build_model(processor, **TILED[kind])
    trainer = VoCoSFTTrainer(
        model,
        config(tmp_path, **options),
        train_dataset=conversations(images_per_row=(1, 2, 0)),
        processing_class=processor,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", TILED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_elastic_training_with_the_uncompressed_image_as_teacher(tmp_path, kind, checkpointing):
    trainer = train(
        tmp_path,
        kind,
        num_voco_tokens=[1, 2, 3],
        distillation_weight=0.5,
        gradient_checkpointing=checkpointing,
        freeze=[],
        max_steps=3,
    )
    assert len(losses(trainer)) == 3 and all(loss == loss and loss > 0 for loss in losses(trainer))
    fresh = build_model(build_processor(kind), **TILED[kind])
    assert not torch.equal(trainer.model.model.image_newline, fresh.model.image_newline)


@pytest.mark.parametrize("kind", TILED)
def test_a_batch_has_the_loss_of_its_rows(tmp_path, kind):
    """Images of other sizes in a batch change nothing: tiles that pad are never seen."""
    trainer = train(tmp_path, kind, max_steps=1, freeze=[])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["image_sizes"].shape == (len(batch["pixel_values"]), 2)
    model = trainer.model.eval()
    with torch.no_grad():
        one, two = (model(**batch, use_cache=False, two_stages=stages).loss for stages in (False, True))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", TILED)
def test_a_teacher_of_the_class_of_transformers(tmp_path, kind):
    processor = build_processor(kind)
    other = build_model(processor, seed=1, **TILED[kind])
    as_llava(other).save_pretrained(tmp_path / "teacher")
    trainer = train(tmp_path, kind, teacher=str(tmp_path / "teacher"), distillation_weight=1.0)
    weights = trainer.teacher_model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in other.state_dict().items())


def test_a_teacher_that_takes_other_images_is_refused(tmp_path):
    as_llava(build_model(build_processor(), seed=1)).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="takes images as llava, the student as llava_next"):
        train(tmp_path, "llava_next", teacher=str(tmp_path / "teacher"), distillation_weight=1.0)
