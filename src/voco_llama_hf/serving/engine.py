"""The thread that computes: requests that wait are answered together, in the order in which they came."""

import copy
import logging
from collections import deque
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

import torch
from transformers import StoppingCriteria

from ..modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from ..pictures import name_number
from .answers import Answer, Job
from .image_cache import ImageCache
from .sampling import Drawing


MAX_BATCH = 16

logger = logging.getLogger(__name__)


class Engine:
    """
    Compresses and answers on one thread. Requests that wait at the same time share a batch, as long as it takes no
    more keys and values than one request that fills the context window. One with a `seed` is computed alone: its
    answer does not depend on who else asks.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Model that answers.
        processor ([`VoCoLlamaProcessor`]): Its processor.
        images ([`ImageCache`]): Images that were compressed before.
    """

    def __init__(self, model: VoCoLlamaForConditionalGeneration, processor: VoCoLlamaProcessor, images: ImageCache):
        self.model, self.processor, self.images = model, processor, images
        self.window: int = model.config.text_config.max_position_embeddings
        # Tokens are drawn by `Drawing`, so for `generate` all that counts is which is largest
        self._config = copy.deepcopy(model.generation_config)
        self._config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None)
        ends = self._config.eos_token_id
        self._end_ids: list[int] = [ends] if isinstance(ends, int) else list(ends or [])
        pad = self._config.pad_token_id
        self._pad_id: int = pad if pad is not None else next(iter(self._end_ids), 0)
        self._inbox: SimpleQueue[Answer | None] = SimpleQueue()
        self._waiting: deque[Answer] = deque()
        self._thread = Thread(target=self._run, name="voco-llama-engine", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Answer:
        """Takes a request on, from the event loop that reads its answer."""
        answer = Answer(job, self.processor.tokenizer, self._end_ids)
        self._inbox.put(answer)
        return answer

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends the thread after what it is at."""
        self._inbox.put(None)

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                batch = [answer for answer in batch if self._compress(answer)]
                if batch:
                    self._generate(batch)
            except Exception:  # whatever it is, the next requests are to be answered
                logger.exception("requests could not be answered")
                for answer in batch:
                    answer.fail()

    def _next_batch(self) -> list[Answer] | None:
        """Those that have waited longest, as many as fit; `None` at the end."""
        while True:
            try:
                answer = self._inbox.get(block=not self._waiting)
            except Empty:
                break
            if answer is None:
                return None
            if not answer.is_done:
                self._waiting.append(answer)
        batch = [self._waiting.popleft()]
        while self._waiting and self._fits([*batch, self._waiting[0]]):
            batch.append(self._waiting.popleft())
        return batch

    def _fits(self, batch: list[Answer]) -> bool:
        jobs = [answer.job for answer in batch]
        columns = max(len(job.input_ids) for job in jobs) + max(job.max_tokens for job in jobs)
        return (
            len(jobs) <= MAX_BATCH
            and len(jobs) * columns <= self.window
            and all(job.sampling.seed is None for job in jobs)
        )

    def _compress(self, answer: Answer) -> bool:
        """Brings the images of a request into memory; whether it is to be answered."""
        job = answer.job
        count, numbers = job.num_voco_tokens, name_number(job.num_voco_tokens, job.per_tile)
        try:
            for picture in job.pictures:
                if answer.is_done:
                    break
                cache, is_known = picture.known, True
                if cache is None:
                    options: dict[str, Any] = {**(picture.pixels or {}), **numbers, "show_progress": False}
                    compress = partial(self.model.compress, **options, exact=False)
                    cache, is_known = self.images.get_or_compress(picture.content_hash, count, compress, job.per_tile)
                if len(cache) != picture.num_tiles:
                    raise ValueError(f"the store has {len(cache)} tiles of an image of {picture.num_tiles}")
                answer.caches.append(cache)
                answer.cached_tokens += sum(cache.token_counts) if is_known else 0
        except Exception:  # the others of its batch have nothing to do with it
            logger.exception("the images of a request could not be compressed")
            answer.fail()
        return not answer.is_done

    def _generate(self, batch: list[Answer]) -> None:
        jobs, device = [answer.job for answer in batch], self.model.device
        length = max(len(job.input_ids) for job in jobs)
        rows = [[self._pad_id] * (length - len(job.input_ids)) + job.input_ids for job in jobs]
        masks = [[0] * (length - len(job.input_ids)) + [1] * len(job.input_ids) for job in jobs]
        caches = [cache for answer in batch for cache in answer.caches]
        images: dict[str, Any] = {"voco_cache": VoCoCache.cat(caches).to(device)} if caches else {}
        config = copy.copy(self._config)
        config.max_new_tokens = max(job.max_tokens for job in jobs)
        self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(masks, device=device),
            **images,
            generation_config=config,
            logits_processor=[Drawing([job.sampling for job in jobs], length, device)],
            stopping_criteria=[Progress(batch)],
        )
        for answer in batch:
            if not answer.is_done:
                raise RuntimeError("generate ended before the answer was complete")


class Progress(StoppingCriteria):
    """Hands every new token to the answer of its row, and ends the rows that are done."""

    def __init__(self, answers: list[Answer]):
        self.answers = answers

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        for answer, token in zip(self.answers, input_ids[:, -1].tolist()):
            answer.push(token)
        done = torch.tensor([answer.is_done for answer in self.answers], device=input_ids.device)
        return done  # type: ignore[return-value]


__all__ = ["Engine"]
