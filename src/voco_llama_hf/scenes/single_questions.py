"""Training as a compressed image is used: every question about it is asked on its own.

In a conversation later questions can be answered from earlier ones, and a description from all of them: little has to
come through the VoCo tokens. Here a row holds many turns that see the image and themselves only.
"""

from __future__ import annotations

import torch
from torch.nn.utils.rnn import pad_sequence

from ..modeling import VoCoLlamaProcessor
from .data import PhaseRow
from .still import Message


IGNORED = -100


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
        self.numbers = {"num_voco_tokens_per_tile" if per_tile else "num_voco_tokens": num_voco_tokens}

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
        messages = [message for example in examples for message in example["messages"]]
        turns = iter(tokenize_turns(self.processor, messages[::2], messages[1::2]))
        rows = [
            self._row(int(images["num_voco_tokens"].sum()), [next(turns) for _ in example["messages"][::2]])
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


def tokenize_turns(
    processor: VoCoLlamaProcessor, questions: list[Message], answers: list[Message]
) -> list[tuple[list[int], list[int]]]:
    """Ids of questions and answers, as they stand behind an image that comes first."""
    image, template = processor.image_token, processor.apply_chat_template
    asked = [[{"role": "user", "content": f"{image}\n{question['content']}"}] for question in questions]
    prompts = template(asked, tokenize=False, add_generation_prompt=True)
    whole = template([[*turn, answer] for turn, answer in zip(asked, answers)], tokenize=False)
    texts = (
        [prompt.removeprefix(image) for prompt in prompts],
        [text.removeprefix(prompt) for text, prompt in zip(whole, prompts)],
    )
    ids = (processor.tokenizer(part, add_special_tokens=False).input_ids for part in texts)
    return list(zip(*ids))
