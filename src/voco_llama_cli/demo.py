"""`voco-llama demo`: a page to try a model in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import DeviceOption, DtypeOption, check_extra


def demo(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model folder or Hub id. By default the small one of the package."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to listen at. By default the first free one from 7860."),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option(min=1, help="Megabytes of an upload.")] = 20,
    max_megapixels: Annotated[int, typer.Option(min=1, max=100, help="Megapixels of an image.")] = 25,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames that are read of a video.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    max_queue: Annotated[int, typer.Option(min=1, help="Visitors that may wait at a time.")] = 32,
    image_cache_mb: Annotated[int, typer.Option(min=0, help="Megabytes of compressed images in memory.")] = 256,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Try a model in the browser: compress a picture, ask about it, and see what it costs.

    voco-llama demo

    voco-llama demo voco-llama-7b --host 0.0.0.0 --port 8080
    """
    check_extra("demo", "demo", ["gradio"])
    from voco_llama_hf.addresses import listen

    from .loading import find_model, load_model

    name = find_model(model)
    listen(host, port or 0).close()  # an error before the model is loaded, not after
    network, processor = load_model(name, device, dtype)

    from rich.console import Console

    from voco_llama_hf.demo import DemoEngine
    from voco_llama_hf.demo.launch import launch
    from voco_llama_hf.serving import Limits

    limits = Limits(max_upload_mb * 1_000_000, max_megapixels * 1_000_000, max_frames, max_tokens, max_queue)
    engine = DemoEngine(network, processor, limits, image_cache_mb * 1_000_000)
    with Console(stderr=True).status("Warming up"):
        engine.warm_up()
    launch(engine, name, host, port, announce=typer.echo)
