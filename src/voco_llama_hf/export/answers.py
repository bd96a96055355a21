"""Exported graphs against PyTorch, on what a model is for: answers to questions about compressed images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..images import open_image
from ..modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..prompts import build_prompt, check_question, starts_with_bos
from .runtime import ORTVoCoLlamaForConditionalGeneration


# Part of the tokens of PyTorch's answers that must stay the first choice, and how far the logits may be in the median
LIMITS = {"fp32": (0.99, 1e-3), "fp16": (0.95, 2e-2), "bf16": (0.9, 1e-1), "int8": (0.9, 2e-1), "int4": (0.8, 3e-1)}
PICTURES = Path(__file__).parents[1] / "demo" / "examples"
QUESTIONS = (
    "What colour is the circle?",
    "What shape is red?",
    "How many objects are there?",
    "Where is the purple object?",
    "Is the green star left of the orange circle?",
    "Describe the picture.",
)
MAX_NEW_TOKENS = 16


@dataclass
class AnswerAgreement:
    """
    How exported graphs answer, where PyTorch has answered so far: questions about images that each has compressed.

    Args:
        num_tokens (`int`): Tokens of PyTorch's greedy answers.
        num_same (`int`): Those that are the first choice of the graphs as well.
        difference (`float`):
            Norm of the difference of the logits of a token by the norm of PyTorch's, in the median over all tokens.
        min_agreement (`float`): What `num_same / num_tokens` must be.
        max_difference (`float`): What `difference` may be.
    """

    num_tokens: int
    num_same: int
    difference: float
    min_agreement: float
    max_difference: float

    @property
    def is_fine(self) -> bool:
        # Written so that a NaN is not fine
        return self.num_same >= self.min_agreement * self.num_tokens and self.difference <= self.max_difference


def default_pictures() -> list[Image.Image]:
    """The pictures that the package ships."""
    return [open_image(PICTURES / name) for name in ("few.png", "crowded.png")]


def check_questions(
    questions: Sequence[str] | None, processor: VoCoLlamaProcessor, voco_token_id: int
) -> Sequence[str]:
    """
    The questions to ask, by default `QUESTIONS`.

    Raises:
        ValueError: if there is none, one is empty or holds a token that stands for an image, or the processor is not
            that of a model with this `voco_token_id`.
    """
    if processor.image_token_id != voco_token_id:
        raise ValueError(
            f"the processor's id of <voco> is {processor.image_token_id}, the model's is {voco_token_id}: pass the "
            "processor of this model"
        )
    if questions is None:
        return QUESTIONS
    if not questions:
        raise ValueError("questions is empty: give at least one, or None for those of the package")
    for question in questions:
        check_question(question, processor)
    return questions


@torch.no_grad()
def compare_answers(
    model: VoCoLlamaForConditionalGeneration,
    exported: ORTVoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    kind: str,
    images: Sequence[Image.Image],
    questions: Sequence[str],
) -> AnswerAgreement:
    """
    Asks every question about every image, at one, eight and the processor's number of VoCo tokens.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): The model in PyTorch.
        kind (`str`): Precision or quantization of the graphs, which says what they may differ.
    """
    same, differences = [], []
    for num_voco_tokens in sorted({1, processor.num_voco_tokens, 8}):
        for image in images:
            inputs = ask(processor, image, questions, num_voco_tokens).to(model.device)
            answered, is_answer = answer(model, dict(inputs))
            expected = model(**answered).logits[:, :-1][is_answer].float()
            outputs = exported(**answered)
            logits = outputs.logits[:, :-1].to(expected.device)[is_answer].float()  # type: ignore[index]
            same.append(logits.argmax(-1) == expected.argmax(-1))
            differences.append((logits - expected).norm(dim=-1) / expected.norm(dim=-1))
    is_same = torch.cat(same)
    return AnswerAgreement(len(is_same), int(is_same.sum()), float(torch.cat(differences).median()), *LIMITS[kind])


def ask(processor: VoCoLlamaProcessor, image: Image.Image, questions: Sequence[str], num_voco_tokens: int):
    """All questions about one image as one batch."""
    prompts = [build_prompt(processor, ["image"], question) for question in questions]
    return processor(
        images=[image] * len(prompts),
        text=prompts,
        num_voco_tokens=num_voco_tokens,
        add_special_tokens=not starts_with_bos(prompts[0], processor),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def answer(model: VoCoLlamaForConditionalGeneration, inputs: dict) -> tuple[dict, torch.Tensor]:
    """The inputs with PyTorch's greedy answers behind them, and where the next token is one of an answer."""
    length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
    new = ids[:, length:]
    eos = model.generation_config.eos_token_id
    is_end = torch.isin(new, torch.tensor([] if eos is None else eos, device=new.device))
    # An answer ends with its first end token; what follows is padding
    is_new = is_end.long().cumsum(1) - is_end.long() == 0
    is_answer = torch.cat([torch.zeros_like(ids[:, 1:length], dtype=torch.bool), is_new], dim=1)
    mask = torch.cat([inputs["attention_mask"], is_new.long()], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": mask}, is_answer


def check_answers(answers: AnswerAgreement, kind: str) -> None:
    """
    Raises:
        ValueError: if the graphs answer otherwise than PyTorch.
    """
    if not answers.is_fine:
        raise ValueError(
            f"in {kind} the graphs answer otherwise than PyTorch: {answers.num_same} of {answers.num_tokens} tokens "
            f"are the same, {answers.min_agreement:.0%} must be, and logits differ by {answers.difference:.1e} of "
            f"their size in the median, allowed is {answers.max_difference:.0e}"
        )
