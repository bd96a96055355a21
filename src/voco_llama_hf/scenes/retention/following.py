"""Follows a training by the questions of the validation split that it gets right, which tells when an arm is done."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


EXACT_MATCH = "eval_exact_match"

Batch = dict[str, torch.Tensor]


class Point(NamedTuple):
    """
    A model in its training, on the validation split.

    Args:
        step (`int`): Optimizer steps so far.
        loss (`float`): Of answers and descriptions.
        exact_match (`float`): Share of the questions about dense scenes that are answered right.
    """

    step: int
    loss: float
    exact_match: float


Curve = list[Point]


def exact_match(logits: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> float:
    """
    The share of answers whose every token is the likeliest one after those before it: the same as the exact match of
    greedy decoding.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): What follows each token.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Tokens of the answers, otherwise -100.
        groups (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Number of the question in its row.
    """
    labels, groups = labels[:, 1:], groups[:, 1:]
    rows = torch.arange(len(labels), device=labels.device)[:, None]
    scored = labels != -100
    questions, question = (rows * (groups.max() + 1) + groups)[scored].unique(return_inverse=True)
    wrong = (logits[:, :-1].argmax(-1) != labels)[scored]
    return 1 - len(question[wrong].unique()) / len(questions)


class Follower(TrainerCallback):
    """
    Adds [`exact_match`] to what the trainer logs of an evaluation.

    Args:
        batches (`list[dict]`): What the model takes, of [`SingleQuestionCollator`].
        attention_mode (`str`): What text sees.
    """

    def __init__(self, batches: list[Batch], attention_mode: str):
        self.batches = batches
        self.attention_mode = attention_mode

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        model: PreTrainedModel = kwargs["model"]
        training = model.training
        model.eval()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            shares = [self._exact_match(model, batch) for batch in self.batches]
        model.train(training)
        state.log_history[-1][EXACT_MATCH] = sum(shares) / len(shares)

    @torch.no_grad()
    def _exact_match(self, model: PreTrainedModel, batch: Batch) -> float:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        logits = model(**batch, attention_mode=self.attention_mode).logits
        return exact_match(logits, batch["labels"], batch["text_groups"])
