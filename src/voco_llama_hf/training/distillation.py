"""Attention distillation (paper, Eq. 5): what the uncompressed image says, taught to the VoCo tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from ..llava import CLASSES, TILE_SETTINGS
from ..modeling import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration


@dataclass
class Reading:
    """
    What a model made of a batch.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Last hidden states.
        head (`torch.nn.Linear`):
            Projects them to the vocabulary.
    """

    hidden_states: torch.Tensor
    head: torch.nn.Linear

    def repeat(self, times: int, labels: torch.Tensor) -> Reading:
        """
        The same for rows that stand several times in a batch, each time behind another number of VoCo tokens.

        Args:
            times (`int`): How often.
            labels (`torch.LongTensor` of shape `(times * batch_size, sequence_length)`):
                Of all rows; -100 where nothing is scored, and no hidden state is needed.
        """
        rows, length = labels.shape
        scored = labels[:, 1:] != -100
        own = self.hidden_states[:, :-1][scored[: rows // times]]
        repeated = own.new_zeros(rows, length, own.shape[-1])
        repeated[:, :-1][scored] = own.repeat(times, 1)
        return Reading(repeated, self.head)


def kl_divergence(student: Reading, teacher: Reading, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    KL(teacher || student) of the next-token distributions, summed over the tokens that `labels` score. Projected in
    tiles: neither model's logits exist in full.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 where nothing is scored.
        temperature (`float`): Softens both distributions.

    Returns:
        `torch.Tensor`: a scalar in nats, with a gradient to the student.
    """
    total, _, _ = _chunked_divergence_loss(
        student.hidden_states[:, :-1],
        teacher.hidden_states[:, :-1],
        student.head.weight,
        teacher.head.weight,  # has no gradient from here; detached, ZeRO-3 would not know it as one to gather
        labels[:, 1:] != -100,
        beta=0.0,  # forward KL
        num_items_in_batch=1,
        temperature=temperature,
    )
    return total


@contextmanager
def on_last_hidden_states(model: PreTrainedModel, act: Callable[[torch.Tensor], object]) -> Iterator[None]:
    """
    Calls `act` with the last hidden states of every forward call, inside of it: there, sharded weights of the head are
    whole.
    """
    handle = model.base_model.register_forward_hook(lambda module, args, output: act(output.last_hidden_state))
    try:
        yield
    finally:
        handle.remove()


def keep_head_for_backward(model: PreTrainedModel) -> None:
    """Has ZeRO-3 gather the head for the whole backward pass, since two losses outside of it have gradients to it."""
    if is_deepspeed_zero3_enabled():
        import deepspeed

        deepspeed.zero.register_external_parameter(model, model.get_output_embeddings().weight)


def bare(model: torch.nn.Module) -> PreTrainedModel:
    """The model inside its PEFT wrapper, if it has one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def read_uncompressed(
    wrapped: torch.nn.Module, model: torch.nn.Module, inputs: dict[str, Any], without_adapters: bool
) -> Reading:
    """
    The teacher's reading: all vision tokens, no gradient, no dropout.

    Args:
        wrapped (`torch.nn.Module`): What is called: `model`, or its distributed wrapper.
        model (`torch.nn.Module`): The model itself, perhaps in its PEFT wrapper.
        inputs (`dict`): The student's inputs.
        without_adapters (`bool`): Whether PEFT adapters are disabled.
    """
    found: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    adapters = model.disable_adapter() if without_adapters else nullcontext()
    with torch.no_grad(), adapters, on_last_hidden_states(bare(model), found.append):
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        # The hidden states are enough: no logits but one
        wrapped(**{**inputs, "attention_mode": "uncompressed", "logits_to_keep": 1, "use_cache": False})
    model.train(was_training)
    return Reading(found[0].detach(), bare(model).get_output_embeddings())


def load_teacher(path: str, student: VoCoLlamaConfig, **kwargs) -> VoCoLlamaForConditionalGeneration:
    """
    Loads a VoCo-LLaMA or a LLaVA, LLaVA-NeXT or LLaVA-OneVision as a teacher.

    Args:
        path (`str`): Folder or Hub id.
        student ([`VoCoLlamaConfig`]): The student's configuration, which gives a LLaVA its `<voco>` token and prefix.
        kwargs: What `from_pretrained` takes.

    Raises:
        ValueError: if it is another kind of model, takes other images, or its vocabulary is not the student's.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type in CLASSES:
        config = as_voco_config(config, student)
    elif config.model_type != VoCoLlamaConfig.model_type:
        known = ", ".join(CLASSES)
        raise ValueError(f"the teacher {path} is a {config.model_type} model, expected voco_llama or one of {known}")
    if describe_images(config) != describe_images(student):
        raise ValueError(
            f"the teacher {Path(path).name} takes images as {describe_images(config)}, the student as "
            f"{describe_images(student)}: both are given the same"
        )
    own, other = student.text_config.vocab_size, config.text_config.vocab_size
    if own != other:
        raise ValueError(
            f"the teacher {Path(path).name} has a vocabulary of {other} tokens, the student one of {own}: "
            "distillation compares distributions over the same tokens"
        )
    teacher = VoCoLlamaForConditionalGeneration.from_pretrained(path, config=config, **kwargs)
    return teacher.eval().requires_grad_(False)


def describe_images(config: VoCoLlamaConfig) -> str:
    """How images are given to a model."""
    grid = "" if config.image_grid_pinpoints is None else f" with image_grid_pinpoints {config.image_grid_pinpoints}"
    return f"{config.base_model_type}{grid}"


def as_voco_config(llava: Any, student: VoCoLlamaConfig) -> VoCoLlamaConfig:  # of one of `CLASSES`
    """The configuration under which the weights of a LLaVA load as a VoCo-LLaMA; what LLaVA lacks is the student's."""
    return VoCoLlamaConfig(
        text_config=llava.text_config,
        vision_config=llava.vision_config,
        vision_feature_layer=llava.vision_feature_layer,
        vision_feature_select_strategy=llava.vision_feature_select_strategy,
        projector_hidden_act=llava.projector_hidden_act,
        multimodal_projector_bias=llava.multimodal_projector_bias,
        base_model_type=llava.model_type,
        **{name: vars(llava)[name] for name in TILE_SETTINGS if name in vars(llava)},
        voco_token_id=student.voco_token_id,
        vision_prefix_token_ids=student.vision_prefix_token_ids,
        vision_suffix_token_ids=student.vision_suffix_token_ids,
    )
