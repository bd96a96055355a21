"""TRL's trainers of preferences and rewards take the model, its processor and images as they are."""

import numpy as np
import pytest
import torch
from datasets import Dataset, disable_progress_bars
from training.sft_helpers import losses, noise_image, processor_and_model, same_weights
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from voco_llama_hf import VoCoLlamaForConditionalGeneration


disable_progress_bars()


def parts(folder, k):
    """A processor that makes `k` VoCo tokens of every image and does not say so, and its model, as loaded."""
    processor, model = processor_and_model()
    processor.num_voco_tokens = model.config.num_voco_tokens = k
    # A reference model is loaded from there
    model.save_pretrained(folder)
    model = VoCoLlamaForConditionalGeneration.from_pretrained(folder)
    # These trainers hand its output on to functions of fixed arguments
    processor.return_num_voco_tokens = False
    return processor, model


def options(tmp_path, **overrides):
    return {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        **overrides,
    }


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def rows(number=4, num_images=1, **columns):
    rng = np.random.default_rng(0)
    images = [[noise_image(rng) for _ in range(num_images)] for _ in range(number)]
    prompts = [user(f"what {letter}") for letter in "abcdefgh"[:number]]
    return Dataset.from_dict({"prompt": prompts, "images": images, **columns})


def letters(completions, **_):
    """A reward that differs between answers."""
    return [float(sum(map(ord, completion[0]["content"])) % 101) for completion in completions]


def check_trained(trainer, before):
    trainer.train()
    assert len(losses(trainer)) == 2 and np.isfinite(losses(trainer)).all()
    changed = {name for name, _ in before.named_parameters()} - same_weights(before, trainer.model)
    assert {name for name in changed if "language_model.layers" in name}
    assert {name for name in changed if "multi_modal_projector" in name}


@pytest.mark.parametrize(
    ("k", "num_images", "overrides"),
    [
        (1, 1, {}),
        (2, 1, {"beta": 0.1}),
        (3, 2, {"beta": 0.1, "num_iterations": 2}),
        (2, 1, {"num_iterations": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_grpo(tmp_path, k, num_images, overrides):
    run_online(GRPOTrainer, GRPOConfig, tmp_path, k, num_images, overrides)


@pytest.mark.parametrize(("k", "num_images"), [(1, 1), (2, 2)])
def test_rloo(tmp_path, k, num_images):
    run_online(RLOOTrainer, RLOOConfig, tmp_path, k, num_images, {"num_iterations": 2})


def run_online(trainer_class, config_class, tmp_path, k, num_images, overrides):
    processor, model = parts(tmp_path, k)
    # No answer has an image
    generation = {"suppress_tokens": [processor.image_token_id]}
    config = config_class(
        **options(
            tmp_path,
            num_generations=2,
            max_completion_length=4,
            generation_kwargs=generation,
            **overrides,
        )
    )
    torch.manual_seed(0)
    trainer = trainer_class(
        model, letters, args=config, train_dataset=rows(num_images=num_images), processing_class=processor
    )
    check_trained(trainer, processor_and_model()[1])


@pytest.mark.parametrize("k", [1, 2])
def test_dpo(tmp_path, k):
    processor, model = parts(tmp_path, k)
    data = rows(chosen=[assistant("yes")] * 4, rejected=[assistant("no, never")] * 4)
    trainer = DPOTrainer(model, args=DPOConfig(**options(tmp_path)), train_dataset=data, processing_class=processor)
    check_trained(trainer, processor_and_model()[1])


@pytest.mark.parametrize("k", [1, 2])
def test_kto(tmp_path, k):
    processor, model = parts(tmp_path, k)
    data = rows(completion=[assistant("yes"), assistant("no, never")] * 2, label=[True, False] * 2)
    trainer = KTOTrainer(model, args=KTOConfig(**options(tmp_path)), train_dataset=data, processing_class=processor)
    check_trained(trainer, processor_and_model()[1])
