"""Compressing images beside the bare passes, and a long video on a card of 24 GB."""

from __future__ import annotations

import time
from functools import partial

import torch

from voco_llama_hf import VoCoCache
from voco_llama_hf.benchmark.measure import synchronize
from voco_llama_hf.benchmark.suite import Suite

from .networks import SMALL_CARD, large_network, memory_limit, peak_memory
from .record import Parts
from .setting import Setting, report


BATCH_SIZES = (1, 16, 64)
FRAMES, COMPRESSED_FRAMES, FRAMES_AT_A_TIME = 20_000, 640, 16
ASKED_ABOUT = 64


def run(parts: Parts, setting: Setting) -> None:
    for batch_size in setting.pick(BATCH_SIZES, (1, 2)):
        parts.run(f"batch of {batch_size}", partial(compress, setting, batch_size))
    parts.run("20,000 frames in 24 GB", partial(hold_frames, setting))


def compress(setting: Setting, batch_size: int) -> dict[str, object]:
    """Seconds of compressing, and of vision tower and one causal pass."""
    suite = Suite(large_network(setting), 1, 32, new_tokens=2, rounds=setting.pick(7, 1), static=False, report=report)
    return {"compression": suite.compression(batch_size)}


@torch.no_grad()
def hold_frames(setting: Setting) -> dict[str, object]:
    """
    Compresses frames as they come, holds as many as the 20,000 of a long video take, and asks about the last ones.
    To save minutes only the first are compressed; the others are copies.
    """
    frames, compressed = setting.pick((FRAMES, COMPRESSED_FRAMES), (64, 32))
    model = large_network(setting)
    with memory_limit(SMALL_CARD):
        size = model.config.vision_config.image_size
        pixels = torch.randn(FRAMES_AT_A_TIME, 3, size, size, device=model.device, dtype=model.dtype)
        model.compress(pixels, 1)  # warms up
        synchronize(model.device)
        start = time.perf_counter()
        stream = [model.compress(pixels, 1) for _ in range(compressed // FRAMES_AT_A_TIME)]
        synchronize(model.device)
        seconds = (time.perf_counter() - start) / compressed
        held = [*stream, *copies(stream[0], (frames - compressed) // FRAMES_AT_A_TIME)]
        asked = VoCoCache.cat(held[-ASKED_ABOUT // FRAMES_AT_A_TIME :])
        voco = torch.full((1, len(asked)), model.config.voco_token_id)
        text = torch.randint(3, 100, (1, 32), generator=torch.Generator().manual_seed(0))
        text[text == model.config.voco_token_id] = 2
        input_ids = torch.cat([voco, text], dim=1).to(model.device)
        answer = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            voco_cache=asked,
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        return {
            "frames_held": sum(map(len, held)),
            "frames_compressed": compressed,
            "frames_asked_about": len(asked),
            "seconds_a_frame": seconds,
            "frame_bytes": stream[0].nbytes // len(stream[0]),
            "new_tokens": answer.shape[1] - input_ids.shape[1],
            "limit_gib": SMALL_CARD,
            "peak_bytes": peak_memory(),
        }


def copies(cache: VoCoCache, number: int) -> list[VoCoCache]:
    """As much memory as so many caches of other frames would take."""
    return [
        VoCoCache(cache.keys.clone(), cache.values.clone(), cache.token_counts, cache.fingerprint)
        for _ in range(number)
    ]
