"""Everything `voco-llama benchmark` measures: first tokens, decoding, compressing, and many images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import CompileConfig

from ..modeling import VoCoLlamaForConditionalGeneration
from ..modeling.configuration_voco_llama import cache_bytes
from ..pictures import random_pictures
from ..vision_tokens import count_vision_tokens
from .flops import run_bare_passes
from .measure import (
    Timing,
    alternate,
    event_seconds,
    find_largest,
    free_bytes,
    kernel_seconds,
    memory_bandwidth,
    peak_bytes,
    runs_on_gpu,
    synchronize,
)
from .question import (
    FULL_CACHE,
    LIMIT,
    VOCO_CACHE,
    WAYS,
    Question,
    fresh,
    make_networks,
)


Record = dict[str, Any]
Report = Callable[[str], None]
BARE_PASSES, COMPRESS = "bare passes", "compress"
NOT_MEASURED: Record = {
    "weight_reading": None,
    "first_token": [],
    "decoding": [],
    "largest_batches": [],
    "compression": [],
    "many_images": [],
}
# Keys and values of a full cache exist twice while a token is appended to them
COPIES = 2.5


@dataclass
class Suite:
    """
    Measures one model.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]):
            On the device to measure.
        num_voco_tokens, prompt_tokens (`int`):
            Tokens an image, and of text.
        new_tokens (`int`):
            Tokens that are decoded.
        rounds (`int`):
            Rounds whose medians are taken.
        static (`bool`):
            Static caches and compiled decoding, instead of dynamic caches.
        report (`Callable[[str], None]`):
            Is told what is being measured.
    """

    model: VoCoLlamaForConditionalGeneration
    num_voco_tokens: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    static: bool
    report: Report

    def __post_init__(self) -> None:
        self._networks = make_networks(self.model)

    def run(self, batch_sizes: list[int], images: list[int], compress_batch_sizes: list[int]) -> Record:
        """All measurements, as the file of results has them."""
        return {
            "weight_reading": self.weight_reading(),
            "first_token": [record for size in batch_sizes for record in self.first_tokens(size)],
            "decoding": [record for size in batch_sizes for record in self.decoding(size)],
            "largest_batches": self.largest_batches(max(batch_sizes)),
            "compression": [record for size in compress_batch_sizes for record in self.compression(size)],
            "many_images": [record for number in images for record in self.many_images(number)],
        }

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def ways(self) -> tuple[str, ...]:
        """A full cache of the caller's is dynamic."""
        return tuple(way for way in WAYS if way != FULL_CACHE or not self.static)

    def first_tokens(self, batch_size: int) -> list[Record]:
        """Seconds to the first token of an answer, by way of asking."""
        calls = {way: self._ask(way, batch_size, 1) for way in self._fitting(batch_size)}
        title = f"First token, batch of {batch_size}"
        timings = alternate(calls, self.rounds, self.device, lambda text: self.report(f"{title}: {text}"))
        return [
            {
                **self._settings(batch_size, way),
                **timing_record(timing),
                "kernel_seconds": kernel_seconds(calls[way], self.device),
                "event_seconds": event_seconds(calls[way], self.device),
                "peak_bytes": peak_bytes(calls[way], self.device),
            }
            for way, timing in timings.items()
        ]

    def decoding(self, batch_size: int) -> list[Record]:
        """Tokens a second behind the first one."""
        ways = [way for way in self._fitting(batch_size) if way in (FULL_CACHE, VOCO_CACHE, LIMIT)]
        lengths = {"first": 1, "all": self.new_tokens}
        calls = {
            f"{way} {name}": self._ask(way, batch_size, length) for way in ways for name, length in lengths.items()
        }
        title = f"Decoding, batch of {batch_size}"
        timings = alternate(calls, self.rounds, self.device, lambda text: self.report(f"{title}: {text}"))
        records = []
        for way in ways:
            seconds = timings[f"{way} all"].median - timings[f"{way} first"].median
            records.append(
                {
                    **self._settings(batch_size, way),
                    # On a machine that does something else besides, the difference may drown in it
                    "tokens_per_second": batch_size * (self.new_tokens - 1) / seconds if seconds > 0 else None,
                    "peak_bytes": peak_bytes(calls[f"{way} all"], self.device),
                }
            )
        return records

    def largest_batches(self, start: int) -> list[Record]:
        """The largest batch that a GPU's memory holds; nothing on a CPU, whose memory is shared with others."""
        if self.device.type != "cuda":
            return []
        records = []
        for way in (FULL_CACHE, VOCO_CACHE):
            if way not in self.ways:
                continue
            self.report(f"Largest batch, {way}")
            records.append(self._settings(find_largest(partial(self._runs, way), start), way))
        return records

    def weight_reading(self) -> Record:
        """Seconds to read the weights of the language model once, at the bandwidth that a large copy reaches."""
        self.report("Memory bandwidth")
        layers = self.model.model.language_model.layers
        read = [*layers.parameters(), self.model.lm_head.weight]
        num_bytes, bandwidth = sum(weight.nbytes for weight in read), memory_bandwidth(self.device)
        return {"bytes": num_bytes, "bytes_per_second": bandwidth, "seconds": num_bytes / bandwidth}

    def compression(self, batch_size: int) -> list[Record]:
        """Seconds to compress a batch of images, beside the bare passes."""
        pictures, count = random_pictures(self.model, batch_size), self.num_voco_tokens
        calls: dict[str, Callable[[], object]] = {
            BARE_PASSES: lambda: run_bare_passes(self.model, pictures, count),
            COMPRESS: lambda: self.model.compress(**pictures, num_voco_tokens=count, batch_size=batch_size),
        }
        title = f"Compressing, batch of {batch_size}"
        timings = alternate(calls, self.rounds, self.device, lambda text: self.report(f"{title}: {text}"))
        return [
            {
                "what": what,
                "batch_size": batch_size,
                **timing_record(timing),
                "kernel_seconds": kernel_seconds(calls[what], self.device),
            }
            for what, timing in timings.items()
        ]

    def many_images(self, num_images: int) -> list[Record]:
        """Seconds to the first token of an answer about many images of one row."""
        ways = [way for way in (FULL_CACHE, VOCO_CACHE) if way in self._fitting(1, num_images)]
        calls = {way: self._ask(way, 1, 1, num_images) for way in ways}
        title = f"{num_images:,} images"
        timings = alternate(calls, self.rounds, self.device, lambda text: self.report(f"{title}: {text}"))
        return [
            {
                **self._settings(1, way),
                "num_images": num_images,
                **timing_record(timing),
                "peak_bytes": peak_bytes(calls[way], self.device),
            }
            for way, timing in timings.items()
        ]

    def _runs(self, way: str, batch_size: int) -> bool:
        """Whether a batch ends before the memory of a GPU does."""
        return runs_on_gpu(lambda: self._ask(way, batch_size, self.new_tokens)())

    def _settings(self, batch_size: int, way: str) -> Record:
        return {"way": way, "batch_size": batch_size, "cache": "static" if self.static else "dynamic"}

    def _fitting(self, batch_size: int, num_images: int = 1) -> list[str]:
        """Ways of asking whose caches fit into memory."""
        vision = num_images * count_vision_tokens(self.model.config)
        full = COPIES * cache_bytes(self.model.config, batch_size * (vision + self.prompt_tokens), self.model.dtype)
        small = (VOCO_CACHE, LIMIT)
        return [way for way in self.ways if way in small or full < free_bytes(self.device)]

    def _ask(self, way: str, batch_size: int, new_tokens: int, num_images: int = 1) -> Callable[[], torch.Tensor]:
        question = Question(self._networks, self.num_voco_tokens, self.prompt_tokens, batch_size, num_images)
        network = self._networks[way]
        inputs = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in question.inputs(way).items()
        }
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        if self.static:
            # One length for every call, so that what was compiled is used again
            length = inputs["attention_mask"].shape[1] + self.new_tokens
            options |= {"cache_implementation": "static", "max_cache_len": length, "compile_config": compile_config()}

        def call() -> torch.Tensor:
            answer = network.generate(**fresh(inputs), **options, max_new_tokens=new_tokens)
            synchronize(self.device)
            return answer

        return call


def compile_config() -> CompileConfig:
    """Compiled decoding as `generate` has it on a GPU, on a CPU too, which has no graphs to capture."""
    config = CompileConfig() if torch.cuda.is_available() else CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def timing_record(timing: Timing) -> Record:
    return {
        "seconds": timing.median,
        "spread": timing.spread,
        "processor_seconds": timing.processor_median,
        "all_seconds": timing.seconds,
    }
