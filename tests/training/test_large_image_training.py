"""Training on images that are divided into tiles, each with vision tokens of its own number."""

import pytest
import torch
from datasets import disable_progress_bars
from modeling.helpers import TILED, build_processor
from training.sft_helpers import build_model, config, conversations, losses, record_inputs

from voco_llama_hf.llava import as_llava
from voco_llama_hf.training import VoCoSFTTrainer
from voco_llama_hf.training.elastic import draw_num_voco_tokens


disable_progress_bars()


def make_trainer(tmp_path, kind, **options):
    processor = build_processor(kind)
    return VoCoSFTTrainer(
        build_model(processor, **TILED[kind]),
        config(tmp_path, **options),
        train_dataset=conversations(images_per_row=(1, 2, 0)),
        processing_class=processor,
    )


def train(tmp_path, kind, **options):
    trainer = make_trainer(tmp_path, kind, **options)
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
def test_voco_tokens_of_every_tile(tmp_path, kind):
    """Drawn for every step; a batch is what the processor makes of its images in tiles, in both ways of computing."""
    trainer = make_trainer(tmp_path, kind, num_voco_tokens_per_tile=[2, 1, 3], two_stages=True, freeze=[], max_steps=6)
    seen = []
    record_inputs(trainer.model, seen)
    trainer.train()
    assert len(losses(trainer)) == 6 and all(loss == loss and loss > 0 for loss in losses(trainer))
    drawn = [draw_num_voco_tokens([2, 1, 3], trainer.args.seed, step) for step in range(6)]
    assert set(drawn) == {1, 2, 3} and [set(counts) for counts, _ in seen] == [{k} for k in drawn]
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch["num_voco_tokens"].tolist()) == {3}
    model, processor = trainer.model.eval(), trainer.processing_class
    assert processor.num_voco_tokens == model.config.num_voco_tokens == 1  # of a whole image, which is another thing
    trainer.save_model()
    assert type(processor).from_pretrained(tmp_path).num_voco_tokens_per_tile == 2  # the first, as of whole images
    images = [image for row in trainer.train_dataset.select(range(2)) for image in row["images"]]
    expected = processor(images=images, num_voco_tokens_per_tile=3, return_tensors="pt")
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(2))))
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    with torch.no_grad():
        one, two = (model(**batch, use_cache=False, two_stages=stages).loss for stages in (False, True))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    trainer.create_model_card()
    assert "| VoCo tokens of every tile, drawn for every step | 2, 1, 3 |" in (tmp_path / "README.md").read_text()
    # A training that names no number goes on so, with what goes with tiles
    unsaid = {"train_dataset": trainer.train_dataset, "processing_class": processor}
    assert VoCoSFTTrainer(model, config(tmp_path / "on"), **unsaid).args.choices == [2]
    with pytest.raises(ValueError, match="distillation compares with all of an uncompressed image"):
        VoCoSFTTrainer(model, config(tmp_path / "on", distillation_weight=0.5), **unsaid)
    # Who trains it for whole images takes that back
    again = config(tmp_path / "again", num_voco_tokens=[3])
    VoCoSFTTrainer(trainer.model, again, train_dataset=trainer.train_dataset, processing_class=processor)
    assert processor.num_voco_tokens_per_tile is None and processor.num_voco_tokens == 3


def test_what_voco_tokens_of_every_tile_do_not_go_with(tmp_path):
    per_tile = {"num_voco_tokens_per_tile": [1, 2]}
    with pytest.raises(ValueError, match="num_voco_tokens of an image or num_voco_tokens_per_tile, not both"):
        config(tmp_path, num_voco_tokens=[1], **per_tile)
    with pytest.raises(ValueError, match="distillation compares with all of an uncompressed image"):
        config(tmp_path, distillation_weight=0.5, **per_tile)
    with pytest.raises(ValueError, match=r"numbers from 1 on, at least one, got \[1, 0\]"):
        config(tmp_path, num_voco_tokens_per_tile=[1, 0])
    processor = build_processor()
    with pytest.raises(ValueError, match="an image processor that divides images"):
        VoCoSFTTrainer(
            build_model(processor),
            config(tmp_path, **per_tile),
            train_dataset=conversations(),
            processing_class=processor,
        )


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
