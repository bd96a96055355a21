"""Training as a compressed image is used: every question about it is asked on its own.

In a conversation later questions can be answered from earlier ones, and a description from all of them: little has to
come through the VoCo tokens. Here a row holds many turns that see the image and themselves only.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling import VoCoLlamaProcessor
from ..pictures import name_number
from .data import PhaseRow
from .still import Message


IGNORED = -100
KNOWN_TURNS = 2**16


class SingleQuestionCollator:
    """
    Makes batches out of conversations about an image or a video each, whose turns do not see each other.

    Args:
        processor ([`VoCoLlamaProcessor`]): Processor of the model.
        num_voco_tokens (`int`): VoCo tokens of every image.
        per_tile (`bool`, *optional*, defaults to `False`): Whether they are those of every tile instead.
    """

    def __init__(self, processor: VoCoLlamaProcessor, num_voco_tokens: int, per_tile: bool = False):
        self.processor = processor
        self.numbers = name_number(num_voco_tokens, per_tile)
        # The same is asked about many images
        self.turn = lru_cache(KNOWN_TURNS)(partial(tokenize_turn, processor))

    def __call__(self, examples: list[PhaseRow]) -> dict[str, torch.Tensor]:
        """
        Args:
            examples (`list[dict]`):
                `image`, or `images` in the order in which they stand before the text, and `messages` of user and
                assistant in turn, their contents plain text.

        Returns:
            What [`VoCoLlamaForConditionalGeneration`] takes: `pixel_values`, `num_voco_tokens`, perhaps `image_sizes`,
            and `input_ids`, `attention_mask`, `labels` and `text_groups`, one row an example, padded on the right.
        """
        frames = [example["images"] if "images" in example else [example["image"]] for example in examples]
        shown = [self.processor(images=row, return_tensors="pt", **self.numbers) for row in frames]
        rows = [
            self._row(int(images["num_voco_tokens"].sum()), [self.turn(*pair) for pair in pairs(example["messages"])])
            for images, example in zip(shown, examples)
        ]
        paddings = (self.processor.tokenizer.pad_token_id, IGNORED, 0, 0)
        ids, labels, groups, mask = (
            pad_sequence(list(column), batch_first=True, padding_value=padding)
            for column, padding in zip(zip(*rows), paddings)
        )
        return {
            **{name: torch.cat([images[name] for images in shown]) for name in shown[0]},
            "input_ids": ids,
            "attention_mask": mask,
            "labels": labels,
            "text_groups": groups,
        }

    def _row(self, num_voco_tokens: int, turns: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
        """Ids, labels, groups and attention mask of one row."""
        ids = [self.processor.image_token_id] * num_voco_tokens
        labels, groups = [IGNORED] * len(ids), [0] * len(ids)
        for group, (question, answer) in enumerate(turns, start=1):
            ids += question + answer
            labels += [IGNORED] * len(question) + answer
            groups += [group] * (len(question) + len(answer))
        return (*map(torch.tensor, (ids, labels, groups)), torch.ones(len(ids), dtype=torch.long))


def pairs(messages: list[Message]) -> list[tuple[str, str]]:
    """Questions with their answers."""
    return [(asked["content"], answer["content"]) for asked, answer in zip(messages[::2], messages[1::2])]


def tokenize_turn(processor: VoCoLlamaProcessor, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of a question and of its answer, as they stand behind an image that comes first."""
    image, template = processor.image_token, processor.apply_chat_template
    asked = [{"role": "user", "content": f"{image}\n{question}"}]
    prompt = template(asked, tokenize=False, add_generation_prompt=True)
    whole = template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    texts = (prompt.removeprefix(image), whole.removeprefix(prompt))
    question_ids, answer_ids = (processor.tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    return question_ids, answer_ids
