"""`voco-llama serve`: an OpenAI-compatible server."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageProblem
from .options import DeviceOption, DtypeOption, check_extra


SERVE_EXTRA = ("fastapi", "openai", "uvicorn")
API_KEYS = "VOCO_LLAMA_API_KEY"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Model folder or Hub id. By default the small one of the package."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000,
    num_voco_tokens: Annotated[
        int | None,
        typer.Option(
            "--num-voco-tokens",
            "-k",
            min=1,
            max=576,
            help="VoCo tokens of an image where a request does not say. By default the model's own number.",
        ),
    ] = None,
    model_id: Annotated[str | None, typer.Option(help="What clients call the model. By default its name.")] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", "-s", help="Keep compressed images in this store as well."),
    ] = None,
    image_cache_mb: Annotated[int, typer.Option(min=0, help="Megabytes of compressed images in memory.")] = 256,
    allow_remote_images: Annotated[
        bool, typer.Option("--allow-remote-images", help="Fetch images from URLs of public addresses.")
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Name of this server in requests, besides addresses, localhost and --host; can be given several "
            "times. `*` is any.",
        ),
    ] = None,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar=API_KEYS,
            help="Key that requests must bring; can be given several times. Others see what is given here: the "
            "variable is for secrets.",
        ),
    ] = None,
    max_request_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a request, images included.")] = 20,
    max_megapixels: Annotated[int, typer.Option(min=1, max=100, help="Megapixels of an image.")] = 50,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a request.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that are answered or wait at a time.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve a model with OpenAI's chat completions.

    voco-llama serve voco-llama-7b --store photos.voco

    An image that was seen before is answered from its compressed form: prompt_tokens_details.cached_tokens says so.
    """
    check_extra("serve", "serve", SERVE_EXTRA)
    if not all(key.strip() for key in api_keys or []):
        raise UsageProblem("an API key is empty")
    from voco_llama_hf.addresses import listen

    from .loading import find_model, load_model

    name = find_model(model)
    listen(host, port).close()  # an error before the model is loaded, not after
    network, processor = load_model(name, device, dtype)
    if num_voco_tokens is not None:
        processor.num_voco_tokens, processor.num_voco_tokens_per_tile = num_voco_tokens, None

    from voco_llama_hf.serving import Limits, build_app, build_server

    limits = Limits(max_request_mb * 1_000_000, max_megapixels * 1_000_000, max_images, max_tokens, max_queue)
    model_id = model_id or (Path(name).absolute().name if Path(name).is_dir() else name)
    app = build_app(
        network,
        processor,
        model_id,
        limits,
        image_cache_mb * 1_000_000,
        store,
        allow_remote_images,
        [host, *(allowed_hosts or [])],
        api_keys or [],
    )
    with listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        typer.echo(f"{model_id} at http://{address}:{listener.getsockname()[1]}/v1")
        # What is loaded stays: looking through it for garbage would stop every answer for a third of a second
        gc.collect()
        gc.freeze()
        build_server(app).run(sockets=[listener])
