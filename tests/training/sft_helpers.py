"""A tiny model, its processor and conversations about noise, for the tests of the trainer."""

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from modeling.helpers import build_processor, tiny_model
from PIL import Image as PILImage

from voco_llama_hf.training import VoCoSFTConfig, VoCoSFTTrainer


def build_model(processor, seed=0, **overrides):
    return tiny_model(seed, voco_token_id=processor.image_token_id, **overrides)


def noise_image(rng):
    return PILImage.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))


def conversations(number=8, images_per_row=(1,), seed=0):
    """Rows of two turns; row i has `images_per_row[i % len(images_per_row)]` images."""
    rng = np.random.default_rng(seed)
    rows = {"messages": [], "images": []}
    for i in range(number):
        num_images = images_per_row[i % len(images_per_row)]
        rows["images"].append([noise_image(rng) for _ in range(num_images)])
        rows["messages"].append(
            [
                {"role": role, "content": "".join(map(chr, rng.integers(97, 123, size=rng.integers(3, 9))))}
                for role in ("user", "assistant", "user", "assistant")
            ]
        )
    messages = List({"role": Value("string"), "content": Value("string")})
    return Dataset.from_dict(rows, features=Features({"messages": messages, "images": List(Image())}))


def config(output_dir, config_class=VoCoSFTConfig, **overrides):
    return config_class(
        **{
            "output_dir": str(output_dir),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "assistant_only_loss": True,
            "max_length": None,
            **overrides,
        }
    )


def make_trainer(
    tmp_path,
    model=None,
    dataset=None,
    peft_config=None,
    callbacks=None,
    teacher_model=None,
    compute_loss_func=None,
    **options,
):
    processor, own = processor_and_model()
    return VoCoSFTTrainer(
        own if model is None else model,
        config(tmp_path, **options),
        train_dataset=conversations() if dataset is None else dataset,
        eval_dataset=conversations(4, seed=1),
        processing_class=processor,
        peft_config=peft_config,
        callbacks=callbacks,
        teacher_model=teacher_model,
        compute_loss_func=compute_loss_func,
    )


def losses(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def processor_and_model(**overrides):
    processor = build_processor()
    return processor, build_model(processor, **overrides)


def same_weights(a, b):
    b = dict(b.named_parameters())
    return {name for name, weight in a.named_parameters() if torch.equal(weight, b[name])}


def record_inputs(model, seen):
    """Notes the numbers of VoCo tokens and the attention mode of every pass."""

    def hook(module, args, kwargs):
        counts = kwargs.get("num_voco_tokens")
        seen.append((None if counts is None else counts.tolist(), kwargs.get("attention_mode")))

    model.model.register_forward_pre_hook(hook, with_kwargs=True)
