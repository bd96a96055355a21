"""`voco-llama ask`: a question about images, or about images that were compressed before."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..images import open_image
from .errors import UsageProblem
from .options import DeviceOption, DtypeOption, ModelOption, NumVoCoTokensOption, human_bytes


if TYPE_CHECKING:
    from ..modeling import VoCoCache, VoCoLlamaProcessor


def ask(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE", help="Images, which stand before the question.", default_factory=list, show_default=False
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, last and in quotes.")],
    model: ModelOption = None,
    num_voco_tokens: NumVoCoTokensOption = None,
    cache: Annotated[
        Path | None, typer.Option(help="Ask about the images in this file of `voco-llama compress` instead.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Also print sizes and times, on stderr.")] = False,
) -> None:
    """Ask a question about one or more images.

    voco-llama ask cat.png "What is on the chair?"

    voco-llama ask --cache cat.safetensors "What is on the chair?"
    """
    check_inputs(images, question, cache)
    from .loading import count_vision_tokens, find_model, load_model

    name = find_model(model)
    pictures = [open_image(image) for image in images]
    from ..modeling import VoCoCache

    stored = None if cache is None else VoCoCache.load(cache)
    network, processor = load_model(name, device, dtype)

    start = clock()
    if stored is None:
        count = num_voco_tokens or processor.num_voco_tokens
        voco_cache = network.compress(**processor(images=pictures, num_voco_tokens=count, return_tensors="pt"))
    else:
        voco_cache = stored.to(network.device)
    compressed = clock()
    prompt = build_prompt(processor, len(voco_cache), question)
    inputs = processor(
        text=prompt,
        voco_cache=voco_cache,
        num_voco_tokens=num_voco_tokens,
        # A template may write the BOS token itself
        add_special_tokens=not prompt.startswith(processor.tokenizer.bos_token or "\0"),
        return_tensors="pt",
    ).to(network.device)
    ids = network.generate(**inputs, voco_cache=voco_cache, max_new_tokens=max_new_tokens, do_sample=False)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    answered = clock()

    typer.echo(processor.decode(answer, skip_special_tokens=True).strip())
    if stats:
        compress_time = f"{compressed - start:.0f} ms" if stored is None else f"done before, in {cache}"
        print_stats(
            voco_cache,
            count_vision_tokens(network.config),
            {"compress": compress_time, "answer": f"{answered - compressed:.0f} ms for {len(answer)} tokens"},
        )


def check_inputs(images: list[str], question: str, cache: Path | None) -> None:
    """
    Raises:
        UsageProblem: if images, question and cache do not make a question about images.
    """
    if os.path.isfile(question):
        raise UsageProblem(f"the question comes last, but {question} is a file")
    if not question.strip():
        raise UsageProblem("the question is empty")
    if cache is not None and images:
        raise UsageProblem("give images or --cache, not both")
    if cache is None and not images:
        raise UsageProblem("no image: give one before the question, or a compressed one with --cache")


def build_prompt(processor: VoCoLlamaProcessor, num_images: int, question: str) -> str:
    """
    The question as the model was trained to be asked, behind its images.

    Raises:
        UsageProblem: if the question holds a token that stands for an image.
    """
    for token in (processor.image_token, processor.voco_token):
        if token in question:
            raise UsageProblem(f"the question has {token} in it: images are put before the question")
    if processor.chat_template is None:
        return f"{processor.image_token}\n" * num_images + question
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": question}]
    conversation: list[dict] = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)


def clock() -> float:
    """Milliseconds; on an accelerator after all work that is still under way."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return 1000 * time.perf_counter()


def print_stats(voco_cache: VoCoCache, vision_tokens: int, times: dict[str, str]) -> None:
    """What was compressed, before and after, and how long it took."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    voco_tokens, vision_tokens = sum(voco_cache.token_counts), vision_tokens * len(voco_cache)
    full_bytes = voco_cache.nbytes // voco_tokens * vision_tokens
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("images", str(len(voco_cache)))
    table.add_row("tokens", f"{vision_tokens} vision -> {voco_tokens} VoCo")
    table.add_row("key-value cache", f"{human_bytes(full_bytes)} -> {human_bytes(voco_cache.nbytes)}")
    for name, duration in times.items():
        table.add_row(name, duration)
    Console(stderr=True).print(table)
