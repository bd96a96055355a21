"""`voco-llama compress`: images into one file of VoCo caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    ModelOption,
    NumVoCoTokensOption,
    NumVoCoTokensPerTileOption,
    check_numbers,
    check_output,
    human_bytes,
    plural,
)


HANDFUL = 8  # images that need no progress bar


def compress(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Images, stored in this order.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write (safetensors).")],
    model: ModelOption = None,
    num_voco_tokens: NumVoCoTokensOption = None,
    num_voco_tokens_per_tile: NumVoCoTokensPerTileOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are compressed at a time.")] = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
) -> None:
    """Compress images into a file, to ask about them later without the images.

    voco-llama compress cat.png dog.png --output pets.safetensors
    """
    check_numbers(num_voco_tokens, num_voco_tokens_per_tile)
    check_output(output, force, inputs=images)
    from voco_llama_hf.images import check_image, open_image

    for image in images:
        check_image(image)
    from .loading import find_model, load_model

    name = find_model(model)
    network, processor = load_model(name, device, dtype)

    from rich.console import Console
    from rich.progress import track

    from voco_llama_hf.modeling import VoCoCache
    from voco_llama_hf.modeling.fingerprint_voco_llama import with_images
    from voco_llama_hf.pictures import choose_number, name_number
    from voco_llama_hf.vision_tokens import count_image_tiles, count_vision_tokens

    count, per_tile = choose_number(processor, num_voco_tokens, num_voco_tokens_per_tile)
    numbers: dict[str, Any] = {**name_number(count, per_tile)}
    caches: list[VoCoCache] = []
    num_tiles: list[int] = []
    vision_tokens = 0
    console = Console(stderr=True)
    starts = range(0, len(images), batch_size)
    quiet = len(images) <= HANDFUL or not console.is_terminal
    for start in track(starts, "Compressing", console=console, transient=True, disable=quiet):
        pictures = [open_image(image) for image in images[start : start + batch_size]]
        inputs = processor(images=pictures, **numbers, return_tensors="pt")
        caches.append(network.compress(**inputs, batch_size=batch_size))
        sizes = [picture.size[::-1] for picture in pictures]
        vision_tokens += sum(count_vision_tokens(network.config, size) for size in sizes)
        num_tiles += [count_image_tiles(network.config, size) for size in sizes]
    cache = VoCoCache.cat(caches)
    cache.fingerprint = with_images(cache.fingerprint, processor.image_processor)
    cache.save(output)

    full_bytes = cache.nbytes // (count * len(cache)) * vision_tokens
    tiles = f" in {','.join(map(str, num_tiles))} tiles" if per_tile else ""
    typer.echo(f"{output}: {plural(len(images), 'image')}{tiles}, {plural(count, 'VoCo token')} each")
    typer.echo(
        f"key-value cache: {human_bytes(full_bytes)} -> {human_bytes(cache.nbytes)}, "
        f"{full_bytes / cache.nbytes:.0f}x smaller"
    )
