"""`voco-llama ask`: a question about images and videos, or about some that were compressed before."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import UsageProblem
from .options import (
    DeviceOption,
    DtypeOption,
    FpsOption,
    ModelOption,
    NumFramesOption,
    NumVoCoTokensOption,
    NumVoCoTokensPerTileOption,
    check_numbers,
    check_sampling_options,
    check_video_extra,
    human_bytes,
    parse_numbers,
)


if TYPE_CHECKING:
    from voco_llama_hf.modeling import VoCoCache, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor


def ask(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Images and videos, which stand before the question.",
            default_factory=list,
            show_default=False,
        ),
    ],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, last and in quotes.")],
    model: ModelOption = None,
    num_voco_tokens: NumVoCoTokensOption = None,
    num_voco_tokens_per_tile: NumVoCoTokensPerTileOption = None,
    cache: Annotated[
        Path | None, typer.Option(help="Ask about the images in this file of `voco-llama compress` instead.")
    ] = None,
    num_tiles: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Of a --cache with VoCo tokens of every tile: tiles of each image, as compress prints them.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--store", "-s", metavar="STORE", help="Ask about what is in this store of `voco-llama index`, or its URL."
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="NAME", help="Image or video in the store; can be given several times."),
    ] = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="Also print sizes and times, on stderr.")] = False,
) -> None:
    """Ask a question about one or more images or videos.

    voco-llama ask cat.png "What is on the chair?"

    voco-llama ask --cache cat.safetensors "What is on the chair?"

    voco-llama ask --store photos.voco --image cat.png "What is on the chair?"
    """
    check_inputs(images, question, cache, store, names or [])
    check_numbers(num_voco_tokens, num_voco_tokens_per_tile)
    if num_tiles is not None and cache is None:
        raise UsageProblem("--num-tiles goes with --cache")
    check_sampling_options(num_frames, fps)
    check_video_extra(images)
    from voco_llama_hf.images import open_image
    from voco_llama_hf.modeling.cache_voco_llama import check_cache
    from voco_llama_hf.modeling.fingerprint_voco_llama import with_images
    from voco_llama_hf.prompts import (
        build_prompt,
        check_num_tokens,
        check_question,
        check_text_length,
        starts_with_bos,
    )
    from voco_llama_hf.videos import is_video
    from voco_llama_hf.vision_tokens import count_vision_tokens

    from .loading import find_model, load_model

    name = find_model(model)
    pictures = [path if is_video(path) else open_image(path) for path in images]
    stored = None
    if cache is not None:
        stored = from_file(cache, None if num_tiles is None else parse_numbers(num_tiles, "--num-tiles"))
    if store is not None:
        count = num_voco_tokens_per_tile or num_voco_tokens
        stored = from_store(store, names or [], count, num_voco_tokens_per_tile is not None)
    network, processor = load_model(name, device, dtype)
    if cache is not None and num_tiles is None and processor.num_voco_tokens_per_tile is not None:
        raise UsageProblem(
            f"{name} compresses every tile of an image: say how many each image of {cache} has with --num-tiles, as "
            "voco-llama compress has printed them"
        )
    if stored is not None:
        made_for = with_images(network.fingerprint(), processor.image_processor)
        check_cache(stored.cache, network.config, made_for, what=str(cache or store))
    window = network.config.text_config.max_position_embeddings
    try:
        check_question(question, processor)
        check_text_length(question, processor, window)
    except ValueError as error:
        raise UsageProblem(str(error)) from None

    start = clock()
    asked = stored
    if asked is None:
        asked = compress_now(network, processor, pictures, num_voco_tokens, num_voco_tokens_per_tile, num_frames, fps)
    voco_cache = asked.cache.to(network.device)
    compressed = clock()
    prompt = build_prompt(processor, asked.kinds, question)
    inputs = processor(
        text=prompt,
        voco_cache=voco_cache,
        num_voco_tokens=num_voco_tokens,
        num_voco_tokens_per_tile=num_voco_tokens_per_tile,
        num_tiles=asked.tiles,
        num_frames=asked.frames,
        add_special_tokens=not starts_with_bos(prompt, processor),
        return_tensors="pt",
    ).to(network.device)
    length = inputs["input_ids"].shape[1]
    check_num_tokens(length, window)
    room = min(max_new_tokens, window - length)
    ids = network.generate(**inputs, voco_cache=voco_cache, max_new_tokens=room, do_sample=False)
    answer = ids[0, length:]
    answered = clock()

    typer.echo(processor.decode(answer, skip_special_tokens=True).strip())
    if stats:
        compress_time = f"{compressed - start:.0f} ms" if stored is None else f"done before, in {cache or store}"
        print_stats(
            voco_cache,
            asked.num_images,
            count_vision_tokens(network.config),
            {"compress": compress_time, "answer": f"{answered - compressed:.0f} ms for {len(answer)} tokens"},
        )


def check_inputs(images: list[str], question: str, cache: Path | None, store: str | None, names: list[str]) -> None:
    """
    Raises:
        UsageProblem: if images, question, cache and store do not make a question about images.
    """
    if os.path.isfile(question):
        raise UsageProblem(f"the question comes last, but {question} is a file")
    if not question.strip():
        raise UsageProblem("the question is empty")
    if cache is not None and images:
        raise UsageProblem("give images or --cache, not both")
    if store is not None and (images or cache is not None):
        raise UsageProblem("give --store with --image, or images, or --cache")
    if (store is None) != (not names):
        raise UsageProblem("--store and --image go together: name what to ask about")
    if cache is None and store is None and not images:
        raise UsageProblem("no image: give one before the question, or a compressed one with --cache or --store")


@dataclass(frozen=True)
class Asked:
    """
    What a question is about: each an `"image"` or a `"video"`, the tiles of each image that have VoCo tokens of their
    own (or 1), and the frames of each video.
    """

    cache: VoCoCache
    kinds: list[str]
    tiles: list[int]
    frames: list[int]

    @property
    def num_images(self) -> int:
        """Images and frames."""
        return len(self.tiles) + sum(self.frames)


def from_file(path: Path, num_tiles: list[int] | None) -> Asked:
    """
    What `voco-llama compress` wrote.

    Raises:
        UsageProblem: if it does not hold so many tiles.
    """
    from voco_llama_hf.modeling import VoCoCache

    cache = VoCoCache.load(path)
    tiles = [1] * len(cache) if num_tiles is None else num_tiles
    if sum(tiles) != len(cache) or min(tiles, default=0) < 1:
        raise UsageProblem(f"{path} has {len(cache)} images or tiles, which are not the {num_tiles} of --num-tiles")
    return Asked(cache, ["image"] * len(tiles), tiles, [])


def from_store(path: str, names: list[str], num_voco_tokens: int | None, per_tile: bool) -> Asked:
    """
    Entries of a store, of so many VoCo tokens an image, or a tile, if it is said.

    Raises:
        UsageProblem: if a name is none of an entry, or of several.
    """
    from voco_llama_hf.modeling import VoCoCache
    from voco_llama_hf.store import VoCoStore

    from .store import find_one

    with VoCoStore(path) as store:
        entries = [find_one(store, name, num_voco_tokens, per_tile) for name in names]
        caches = [store.get(entry.content_hash, entry.num_voco_tokens, entry.sampling) for entry in entries]
    kinds = ["video" if entry.is_video else "image" for entry in entries]
    tiles, frames = ([entry.num_images for entry in entries if entry.is_video == is_film] for is_film in (False, True))
    return Asked(VoCoCache.cat(caches), kinds, tiles, frames)


def compress_now(
    network: VoCoLlamaForConditionalGeneration,
    processor: VoCoLlamaProcessor,
    pictures: list[Any],
    num_voco_tokens: int | None,
    num_voco_tokens_per_tile: int | None,
    num_frames: int | None,
    fps: float | None,
) -> Asked:
    """Images and paths of videos, whose frames are compressed as they are decoded."""
    from voco_llama_hf.modeling import VoCoCache
    from voco_llama_hf.modeling.processing_voco_llama import check_num_voco_tokens
    from voco_llama_hf.pictures import choose_number, name_number, prepare
    from voco_llama_hf.videos import read_frames

    if num_frames is None and fps is None:
        num_frames = processor.num_frames
    count, per_tile = choose_number(processor, num_voco_tokens, num_voco_tokens_per_tile)
    check_num_voco_tokens([count])
    numbers: dict[str, Any] = {**name_number(count, per_tile)}
    caches: list[VoCoCache] = []
    kinds: list[str] = []
    tiles: list[int] = []
    frames: list[int] = []
    for picture in pictures:
        is_film = isinstance(picture, str)
        if is_film:
            frames_of_it = processor.iter_pixel_values(read_frames(picture, num_frames, fps))
            cache = network.compress(frames_of_it, count)
        else:
            cache = network.compress(**prepare(processor.image_processor, picture), **numbers)
        caches.append(cache)
        kinds.append("video" if is_film else "image")
        (frames if is_film else tiles).append(len(cache))
    return Asked(VoCoCache.cat(caches), kinds, tiles, frames)


def clock() -> float:
    """Milliseconds; on an accelerator after all work that is still under way."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return 1000 * time.perf_counter()


def print_stats(voco_cache: VoCoCache, num_images: int, vision_tokens: int, times: dict[str, str]) -> None:
    """What was compressed, before and after, and how long it took."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    voco_tokens, vision_tokens = sum(voco_cache.token_counts), vision_tokens * num_images
    full_bytes = voco_cache.nbytes // voco_tokens * vision_tokens
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("images", str(num_images))
    table.add_row("tokens", f"{vision_tokens} vision -> {voco_tokens} VoCo")
    table.add_row("key-value cache", f"{human_bytes(full_bytes)} -> {human_bytes(voco_cache.nbytes)}")
    for name, duration in times.items():
        table.add_row(name, duration)
    Console(stderr=True).print(table)
