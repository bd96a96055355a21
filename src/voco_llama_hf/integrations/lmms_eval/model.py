"""The model that lmms-eval drives: its requests as questions, and their answers."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages

from ...loading import is_hub_id, load_model, load_processor
from ...modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ...modeling.modeling_voco_llama import ATTENTION_MODES
from ...modeling.processing_voco_llama import check_num_voco_tokens
from ...pictures import choose_number
from .answering import Answerer, Question
from .compat import keep_scores
from .reading import AttentionMode, make_reading
from .visuals import Visual, as_visual, exchange


MAX_CACHE_BYTES = 2 << 30


class LoadedVoCoLlama(lmms):
    """
    A model that is there already, for the tasks of lmms-eval. See [`VoCoLlama`].

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            Model that answers.
        processor ([`VoCoLlamaProcessor`]):
            Its processor.
    """

    is_simple = True

    def __init__(
        self,
        model: VoCoLlamaForConditionalGeneration,
        processor: VoCoLlamaProcessor,
        num_voco_tokens: int | None = None,
        attention_mode: AttentionMode = "voco",
        blind: bool = False,
        num_frames: int | None = None,
        batch_size: int = 1,
        max_cache_bytes: int = MAX_CACHE_BYTES,
    ):
        super().__init__()
        keep_scores()
        self.blind, self.batch_size, self.device = blind, batch_size, model.device
        self.num_frames = num_frames or processor.num_frames
        k, per_tile = choose_number(processor, num_voco_tokens)
        if per_tile and attention_mode != "uncompressed":
            raise ValueError(
                "this model was trained for VoCo tokens of every tile, and tasks are read with those of an image: "
                "give num_voco_tokens to read them so"
            )
        self.answerer = Answerer(make_reading(model, processor, attention_mode, k, max_cache_bytes), batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        answers: list[Any] = [None] * len(requests)
        before = self._counters()
        num_tokens = 0
        for options, indices in group_by_options([self._options(request) for request in requests]):
            questions = LazyQuestions([requests[i] for i in indices], self._question)
            for i, (text, count) in zip(indices, self.answerer.generate(questions, options), strict=True):
                num_tokens += count
                answers[i] = GenerationResult(text, TokenCounts(output_tokens=count))
        self._log(before, num_tokens)
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """
        Mean negative log-likelihood of the tokens of each continuation, as every model of lmms-eval returns it, whose
        tasks take the smallest; and whether greedy decoding would write it.
        """
        before = self._counters()
        scores = list(self.answerer.score(LazyQuestions(requests, self._scored_question)))
        self._log(before, 0)
        return scores

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """
        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("voco_llama answers generate_until and loglikelihood, no tasks of several rounds")

    def clean(self) -> None:
        """Forgets the model, whose memory a judge may need."""
        del self.answerer
        super().clean()

    def _options(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _question(self, request: Instance) -> Question:
        context, _, doc_to_visual, doc_id, task, split = request.args
        return self._ask(context, doc_to_visual, doc_id, task, split)

    def _scored_question(self, request: Instance) -> Question:
        context, target, *shown = request.args
        if not shown:
            # What a choice is worth without the question
            return Question(as_messages(context, [], self.answerer.processor), [], target)
        doc_to_visual, doc_id, task, split = shown
        question = self._ask(context, doc_to_visual, doc_id, task, split)
        text = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
        return Question(question.messages, question.visuals, str(text))

    def _ask(self, context: str, doc_to_visual: Callable[[Any], Any], doc_id: int, task: str, split: str) -> Question:
        docs = self.task_dict[task][split]

        def visuals_of(index: int) -> list[Visual]:
            return [as_visual(source, self.num_frames) for source in flatten(doc_to_visual(docs[index]))]

        visuals = visuals_of(doc_id)
        if self.blind:
            visuals = exchange(visuals, doc_id, len(docs), visuals_of)
        return Question(as_messages(context, visuals, self.answerer.processor), visuals)

    def _counters(self) -> tuple[float, int, int, int]:
        reading = self.answerer.reading
        return self.answerer.seconds, self.answerer.num_answered, reading.num_read, reading.num_reused

    def _log(self, before: tuple[float, int, int, int], num_tokens: int) -> None:
        """What lmms-eval reports as throughput."""
        seconds, answered, read, reused = (now - then for now, then in zip(self._counters(), before, strict=True))
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=num_tokens,
            avg_speed=num_tokens / seconds if seconds else 0.0,
            additional_metrics={
                "rank": self.rank,
                "questions_answered": answered,
                "images_read": read,
                "images_reused": reused,
            },
        )


class VoCoLlama(LoadedVoCoLlama):
    """
    VoCo-LLaMA for the tasks of lmms-eval. An image that many questions share is compressed once.

    Args:
        pretrained (`str`):
            Folder or Hub id of a model or of PEFT adapters.
        num_voco_tokens (`int`, *optional*):
            VoCo tokens of an image, or of a frame of a video. By default the number of the checkpoint, which one that
            was trained for VoCo tokens of every tile does not have.
        attention_mode (`str`, *optional*, defaults to `"voco"`):
            `"voco"`; `"uncompressed"`, as a LLaVA of the same weights reads; or `"causal"`, all vision tokens and VoCo
            tokens behind them.
        blind (`bool`, *optional*, defaults to `False`):
            Whether every question is asked about the images of another one.
        num_frames (`int`, *optional*):
            Frames of a video, evenly spaced. By default the number of the checkpoint.
        batch_size (`int`, *optional*, defaults to 1):
            Questions that are answered at a time.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type to run in, by default that of the checkpoint.
        device (`str`, *optional*):
            Where to run, by default the accelerator if there is one; with `accelerate launch` each process its own.
        attn_implementation (`str`, *optional*):
            Attention to run with.
        max_cache_bytes (`int`, *optional*, defaults to 2 GiB):
            Bytes of compressed images to keep for later questions.
        max_batch_size (`int`, *optional*):
            What lmms-eval passes to every model; not used.

    Raises:
        ValueError: if an argument is out of its bounds, or the model cannot be loaded.
    """

    def __init__(
        self,
        pretrained: str,
        num_voco_tokens: int | None = None,
        attention_mode: AttentionMode = "voco",
        blind: bool = False,
        num_frames: int | None = None,
        batch_size: int | str = 1,
        revision: str = "main",
        dtype: str = "auto",
        device: str | None = None,
        attn_implementation: str | None = None,
        max_cache_bytes: int = MAX_CACHE_BYTES,
        max_batch_size: int | None = None,
    ):
        check_arguments(num_voco_tokens, attention_mode, num_frames, batch_size)
        if not os.path.isdir(pretrained) and not is_hub_id(pretrained):
            raise ValueError(f"no such model folder: {pretrained!r}")
        accelerator = Accelerator()
        place = accelerator.device if device is None or accelerator.num_processes > 1 else torch.device(device)
        options: dict[str, Any] = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        # Its `to` is annotated by transformers as a plain function
        model: Any = load_model(pretrained, revision=revision, dtype=dtype, **options)
        super().__init__(
            model.to(place),
            load_processor(pretrained, revision),
            num_voco_tokens,
            attention_mode,
            blind,
            num_frames,
            int(batch_size),
            max_cache_bytes,
        )
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.answerer.show_progress = accelerator.is_main_process


class VoCoLlamaChat(VoCoLlama):
    """[`VoCoLlama`] for tasks that write conversations, with images between texts. They can only be answered."""

    is_simple = False

    def _options(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _question(self, request: Instance) -> Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        docs, processor = self.task_dict[task][split], self.answerer.processor

        def conversation(index: int) -> list[dict[str, Any]]:
            return ChatMessages(messages=doc_to_messages(docs[index])).model_dump()["messages"]

        def visuals_of(index: int) -> list[Visual]:
            parts = [part for message in conversation(index) for part in message["content"]]
            return [as_visual(part["url"], self.num_frames) for part in parts if part["type"] != "text"]

        visuals = visuals_of(doc_id)
        if self.blind:
            visuals = exchange(visuals, doc_id, len(docs), visuals_of)
        kinds = iter([visual.kind for visual in visuals])
        messages = [
            {
                "role": message["role"],
                "content": [
                    {"type": "text", "text": plain(part["text"], processor)}
                    if part["type"] == "text"
                    else {"type": next(kinds)}
                    for part in message["content"]
                ],
            }
            for message in conversation(doc_id)
        ]
        return Question(messages, visuals)


class LazyQuestions(Sequence[Question]):
    """Questions that are made when their batch comes: the images of a whole data set need not be in memory."""

    def __init__(self, requests: Sequence[Instance], make: Callable[[Instance], Question]):
        self.requests, self.make = requests, make

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.make(request) for request in self.requests[index]]
        return self.make(self.requests[index])


def check_arguments(
    num_voco_tokens: int | None, attention_mode: str, num_frames: int | None, batch_size: int | str
) -> None:
    """
    Raises:
        ValueError: if an argument is out of its bounds.
    """
    numbers = {"num_voco_tokens": num_voco_tokens, "num_frames": num_frames}
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"{name} must be an integer from 1 on, got {number!r}")
    if num_voco_tokens is not None:
        check_num_voco_tokens([num_voco_tokens])
    if attention_mode not in ATTENTION_MODES:
        raise ValueError(f"attention_mode must be one of {', '.join(ATTENTION_MODES)}, got {attention_mode!r}")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be an integer from 1 on, got {batch_size!r}")


def group_by_options(options: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Indices of requests with the same options: they can share a batch, and stay in their order."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, one in enumerate(options):
        groups.setdefault(json.dumps(one, sort_keys=True, default=str), (one, []))[1].append(i)
    return list(groups.values())


def flatten(shown: Any) -> list[Any]:
    """What a document shows, as a list; tasks without images have nothing at all."""
    if shown is None:
        return []
    return list(shown) if isinstance(shown, (list, tuple)) else [shown]


def as_messages(context: str, visuals: Sequence[Visual], processor: VoCoLlamaProcessor) -> list[dict[str, Any]]:
    """A question behind what it shows, or around it where as many `<image>` tokens stand in it."""
    pieces = context.split(processor.image_token)
    parts: list[dict[str, Any]] = [{"type": visual.kind} for visual in visuals]
    if visuals and len(pieces) == len(visuals) + 1 and all(visual.kind == "image" for visual in visuals):
        texts = [{"type": "text", "text": plain(piece, processor)} for piece in pieces]
        content = [part for pair in zip(texts, [*parts, None]) for part in pair if part]
        content = [part for part in content if part.get("text") != ""]
    else:
        content = [*parts, {"type": "text", "text": plain(context, processor)}]
    return [{"role": "user", "content": content}]


def plain(text: str, processor: VoCoLlamaProcessor) -> str:
    """A text in which nothing stands for an image: `<image>` becomes `image`."""
    for token in (processor.image_token, processor.video_token, processor.voco_token):
        text = text.replace(token, token.strip("<>"))
    return text


__all__ = ["LoadedVoCoLlama", "VoCoLlama", "VoCoLlamaChat"]
