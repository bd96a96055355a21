"""Answers to many questions, and how likely given ones are, in batches and in the order in which they were asked."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from ...prompts import render
from .reading import Encoded, Reading
from .visuals import Visual


MAX_NEW_TOKENS = 1024  # where a task does not say


@dataclass(frozen=True)
class Question:
    """
    Args:
        messages (`list[dict]`):
            A conversation for the chat template, with a part of type `"image"` or `"video"` for every visual.
        visuals (`list[Visual]`):
            What they stand for, in order.
        continuation (`str`):
            Text behind the prompt whose likelihood is asked for.
    """

    messages: list[dict[str, Any]]
    visuals: list[Visual]
    continuation: str = ""


class Answerer:
    """
    Args:
        reading ([`Reading`]): How images are read.
        batch_size (`int`): Questions that are answered at a time.
        show_progress (`bool`): Whether to show a progress bar.
    """

    def __init__(self, reading: Reading, batch_size: int, show_progress: bool = True):
        self.reading, self.batch_size, self.show_progress = reading, batch_size, show_progress
        # Its methods are annotated by transformers as of any model
        self.network: Any = reading.network
        self.processor = reading.processor
        self.seconds = 0.0  # spent on answers, from the pixels on
        self.num_answered = 0

    def generate(self, questions: Sequence[Question], options: dict[str, Any]) -> Iterator[tuple[str, int]]:
        """
        Answers and their numbers of tokens.

        Args:
            questions (`Sequence[Question]`): What is asked.
            options (`dict`): The `generation_kwargs` of a task, of which those that are not known are left out.
        """
        stops = stop_strings(options)
        for _, encoded in self._batches(questions):
            room = max(1, self.network.config.text_config.max_position_embeddings - encoded.length)
            sampling = generation_options(options, room)
            if stops:
                sampling |= {"stop_strings": stops, "tokenizer": self.processor.tokenizer}
            ids = self.network.generate(**encoded.inputs, **sampling, pad_token_id=self._pad_id)
            for row in ids[:, encoded.num_returned :]:
                text = self.processor.tokenizer.decode(row, skip_special_tokens=True)
                yield cut(text, stops), int((row != self._pad_id).sum())

    @torch.no_grad()
    def score(self, questions: Sequence[Question]) -> Iterator[tuple[float, bool]]:
        """Mean negative log-likelihood of each token of the continuations, and whether they are the greedy ones."""
        for batch, encoded in self._batches(questions):
            counts = self._count_continuations(batch)
            num_columns = max(counts)
            logits = self.network(**encoded.inputs, use_cache=False, logits_to_keep=num_columns + 1).logits[:, :-1]
            wanted = encoded.input_ids[:, -num_columns:]
            losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
            is_greedy = logits.argmax(-1) == wanted
            for row, count in enumerate(counts):
                yield float(losses[row, -count:].mean()), bool(is_greedy[row, -count:].all())

    @property
    def _pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _batches(self, questions: Sequence[Question]) -> Iterator[tuple[Sequence[Question], Encoded]]:
        """Batches one after the other; the time that the caller takes for one counts as that of its answers."""
        with tqdm(total=len(questions), desc="Answering", disable=not self.show_progress) as bar:
            for start in range(0, len(questions), self.batch_size):
                batch = questions[start : start + self.batch_size]
                began = time.perf_counter()
                prompts = [self._prompt(question) + self._continuation(question) for question in batch]
                yield batch, self.reading.encode(prompts, [question.visuals for question in batch])
                self.seconds += time.perf_counter() - began
                self.num_answered += len(batch)
                bar.update(len(batch))

    def _prompt(self, question: Question) -> str:
        if self.processor.chat_template is not None:
            return render(question.messages, self.processor)
        tokens = {"image": f"{self.processor.image_token}\n", "video": f"{self.processor.video_token}\n"}
        parts = [part for message in question.messages for part in message["content"]]
        return "".join(tokens.get(part["type"], part.get("text", "")) for part in parts)

    def _continuation(self, question: Question) -> str:
        # Behind white space another space would make other tokens than those of a conversation
        is_apart = self._prompt(question)[-1:].isspace()
        return question.continuation.lstrip() if is_apart else question.continuation

    def _count_continuations(self, batch: Sequence[Question]) -> list[int]:
        """Tokens of each continuation, behind its prompt."""
        counts = []
        for question in batch:
            prompt, tokenizer = self._prompt(question), self.processor.tokenizer
            both = tokenizer(prompt + self._continuation(question), add_special_tokens=False).input_ids
            count = len(both) - len(tokenizer(prompt, add_special_tokens=False).input_ids)
            if count < 1:
                raise ValueError(f"a continuation must have at least one token, got {question.continuation!r}")
            counts.append(count)
        return counts


def stop_strings(options: dict[str, Any]) -> list[str]:
    """Texts at which an answer ends, of the `generation_kwargs` of a task."""
    until = options.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def cut(text: str, stops: Sequence[str]) -> str:
    """An answer up to the first of the texts that end it."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text.strip()


def generation_options(options: dict[str, Any], room: int) -> dict[str, Any]:
    """Arguments of `generate` from the `generation_kwargs` of a task, for at most `room` new tokens."""
    temperature = options.get("temperature")
    do_sample = bool(options.get("do_sample")) if temperature is None else temperature > 0
    sampling = {name: options.get(name) if do_sample else None for name in ("temperature", "top_p", "top_k")}
    # What is not said is left to the checkpoint, where there is something to say
    sampling = {name: value for name, value in sampling.items() if value is not None or not do_sample}
    num_tokens = options.get("max_new_tokens") or options.get("max_gen_toks") or MAX_NEW_TOKENS
    penalty = options.get("repetition_penalty")
    return {
        **sampling,
        **({} if penalty is None else {"repetition_penalty": penalty}),
        "do_sample": do_sample,
        "num_beams": options.get("num_beams") or 1,
        "max_new_tokens": min(num_tokens, room),
    }


__all__ = ["Answerer", "Question", "cut", "generation_options", "stop_strings"]
