"""What people do with a model that is being trained: samples at the end of a step, noise on its embeddings."""

import numpy as np
import pytest
import torch
from datasets import disable_progress_bars
from peft import LoraConfig
from training.sft_helpers import conversations, losses, make_trainer, noise_image, processor_and_model
from transformers import TrainerCallback


disable_progress_bars()
LORA = LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")


class Sampler(TrainerCallback):
    """Compresses an image and generates, as it is: in train mode."""

    def __init__(self, processor):
        image = noise_image(np.random.default_rng(3))
        self.inputs = processor(images=image, text="<image>what", num_voco_tokens=2, return_tensors="pt")
        self.caches, self.answers = [], []

    def sample(self, model):
        was_training = model.training
        self.caches.append(model.compress(self.inputs["pixel_values"], 2))
        ids = model.generate(**self.inputs, max_new_tokens=4, do_sample=False)
        self.answers.append(ids[:, self.inputs["input_ids"].shape[1] :])
        with torch.no_grad():
            cached = model(**self.inputs, use_cache=True).logits
            assert (cached - model(**self.inputs, use_cache=False).logits).abs().max() < 1e-4
        assert model.training == was_training

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert model.training
        self.sample(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_samples_in_the_middle_of_a_training(tmp_path, peft_config, use_reentrant):
    processor, _ = processor_and_model()
    sampler = Sampler(processor)
    trainer = make_trainer(
        tmp_path,
        peft_config=peft_config,
        callbacks=[sampler],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        num_voco_tokens=[2, 1],
    )
    trainer.train()
    trained = losses(trainer)
    trainer.model.train()
    sampler.sample(trainer.model)
    # No layer of the model has dropout: training and evaluation differ in the checkpoints alone
    trainer.model.eval()
    sampler.sample(trainer.model)
    *_, in_training, afterwards = sampler.caches
    torch.testing.assert_close(in_training.keys, afterwards.keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(in_training.values, afterwards.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(sampler.answers[-2], sampler.answers[-1])
    plain = make_trainer(
        tmp_path,
        peft_config=peft_config,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        num_voco_tokens=[2, 1],
    )
    plain.train()
    # Samples leave no trace
    assert trained == pytest.approx(losses(plain), abs=1e-6)


def test_images_are_compressed_in_two_stages_with_gradient_checkpointing():
    """As a step of reinforcement learning without long sequences would: the gradient flows, no cache is lost."""
    processor, model = processor_and_model()
    image = noise_image(np.random.default_rng(3))
    inputs = processor(images=image, text="<image>what is it", num_voco_tokens=2, return_tensors="pt")
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    logits = model(**inputs).logits
    logits.float().logsumexp(-1).sum().backward()
    assert model.get_input_embeddings().weight.grad[processor.image_token_id].abs().max() > 0
    model.eval()
    with torch.no_grad():
        assert torch.equal(ids, model.generate(**inputs, max_new_tokens=3, do_sample=False))


def embedding_shapes(model):
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("two_stages", [False, True])
def test_noisy_embeddings(tmp_path, two_stages):
    """NEFTune hooks the embedding, and divides by the length that it sees."""
    trainer = make_trainer(
        tmp_path,
        dataset=conversations(4, images_per_row=(2, 0, 1)),
        neftune_noise_alpha=5.0,
        num_voco_tokens=[2, 1, 0],
        two_stages=two_stages,
        max_steps=3,
    )
    trainer.train()
    assert len(losses(trainer)) == 3 and np.isfinite(losses(trainer)).all()


def test_whoever_hooks_the_embedding_sees_rows_of_ids():
    processor, model = processor_and_model()
    image = noise_image(np.random.default_rng(3))
    inputs = processor(images=image, text="<image>what", num_voco_tokens=2, return_tensors="pt")
    seen = embedding_shapes(model)
    with torch.no_grad():
        model(**inputs, use_cache=False)
        model.compress(inputs["pixel_values"], 2)
        for mode in ("causal", "uncompressed"):
            model(**inputs, attention_mode=mode, use_cache=False)
        model.generate(**inputs, max_new_tokens=2)
    assert seen and all(len(shape) == 2 for shape in seen), seen
