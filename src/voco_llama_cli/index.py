"""`voco-llama index`: a folder of images and videos into a store."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .errors import UsageProblem, printable
from .loading import find_model, load_model
from .options import (
    DeviceOption,
    DtypeOption,
    FpsOption,
    ModelOption,
    NumFramesOption,
    NumVoCoTokensOption,
    NumVoCoTokensPerTileOption,
    check_extra,
    check_numbers,
    check_sampling_options,
    check_video_extra,
    human_bytes,
    plural,
)


if TYPE_CHECKING:
    from voco_llama_hf.store import VoCoStore
    from voco_llama_hf.store.indexing import Indexed


SHOWN_FAILURES = 10


def index(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder that is searched for images and videos. With --cluster also its URL, as s3://bucket/photos, "
            "and Parquet files and tars of images.",
        ),
    ],
    store: Annotated[Path, typer.Option("--store", "-s", help="Folder of the store, made if it is not there.")],
    model: ModelOption = None,
    num_voco_tokens: NumVoCoTokensOption = None,
    num_voco_tokens_per_tile: NumVoCoTokensPerTileOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    eight_bit: Annotated[
        bool | None, typer.Option("--8bit/--no-8bit", help="Keep a new store in 8 bits.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or frames that are compressed at a time.")] = 16,
    shard_images: Annotated[int, typer.Option(min=1, help="Images or frames of a shard: what a kill can lose.")] = 512,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read files ahead.")] = 0,
    num_processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compress, one a device. By default 1, with --cluster one on each."),
    ] = None,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Run on the Ray cluster of RAY_ADDRESS, or on this machine without one."),
    ] = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compress every image and video of a folder into a store, to ask about them later.

    voco-llama index photos --store photos.voco --num-voco-tokens 2

    What is stored already is skipped, so an interrupted run goes on where it was. --cluster runs on many machines,
    which may come and go.
    """
    if not cluster and not os.path.isdir(source):
        raise UsageProblem(f"{source} is not a folder" + (": --cluster reads it" if can_be_table(source) else ""))
    if store.exists() and not store.is_dir():
        raise UsageProblem(f"{store} is a file: --store takes a folder")
    check_numbers(num_voco_tokens, num_voco_tokens_per_tile)
    check_sampling_options(num_frames, fps)
    if cluster:
        options: dict[str, Any] = {
            "num_voco_tokens": num_voco_tokens,
            "num_voco_tokens_per_tile": num_voco_tokens_per_tile,
            "num_frames": num_frames,
            "fps": fps,
            "batch_size": batch_size,
        }
        options |= {"num_threads": num_workers or 2, "device": device, "dtype": dtype.value if dtype else "auto"}
        return run_on_cluster(source, store, find_model(model), num_processes, shard_images, eight_bit, options)
    if num_processes is not None and num_processes > 1:
        flags = {
            "--store": store,
            "--model": model,
            "--num-voco-tokens": num_voco_tokens,
            "--num-voco-tokens-per-tile": num_voco_tokens_per_tile,
            "--num-frames": num_frames,
            "--fps": fps,
            "--batch-size": batch_size,
            "--shard-images": shard_images,
            "--num-workers": num_workers,
            "--device": device,
            "--dtype": dtype and dtype.value,
        }
        args = [str(part) for pair in flags.items() if pair[1] is not None for part in pair]
        if eight_bit is not None:
            args.append("--8bit" if eight_bit else "--no-8bit")
        return launch(num_processes, ["index", source, *args])

    name = find_model(model)
    from voco_llama_hf.store.indexing import Indexer, Sampling, find_files
    from voco_llama_hf.store.processes import Processes

    files = find_files(source)
    check_video_extra(files)
    processes = Processes()
    network, processor = load_model(name, device or own_device(processes.local_rank, processes.number), dtype)
    from voco_llama_hf.modeling.configuration_voco_llama import cache_bytes
    from voco_llama_hf.modeling.processing_voco_llama import check_num_voco_tokens
    from voco_llama_hf.modeling.tiled_processing_voco_llama import check_divides_images
    from voco_llama_hf.pictures import choose_number
    from voco_llama_hf.vision_tokens import count_vision_tokens

    count, per_tile = choose_number(processor, num_voco_tokens, num_voco_tokens_per_tile)
    if per_tile:
        check_divides_images(processor.image_processor)
    sampling = Sampling(num_frames or (processor.num_frames if fps is None else None), fps, per_tile)
    check_num_voco_tokens([count])
    indexer = Indexer(
        store, network, processor, count, sampling, eight_bit, batch_size, shard_images, num_workers, processes
    )
    todo = indexer.select(files)
    vision_tokens = count_vision_tokens(network.config)
    token_bytes = cache_bytes(network.config, 1, network.dtype)
    failures = show(indexer.run(todo), len(todo), vision_tokens, token_bytes, processes.is_main)
    if processes.is_main:
        summarize(cast("VoCoStore", indexer.store), len(files), failures, vision_tokens * token_bytes)


def can_be_table(source: str) -> bool:
    return "://" in source or source.endswith((".parquet", ".tar"))


def run_on_cluster(
    source: str,
    store: Path,
    model: str,
    num_workers: int | None,
    shard_images: int,
    eight_bit: bool | None,
    options: dict[str, Any],
) -> None:
    """Shards by workers of Ray, which the index of the store takes in."""
    check_extra("--cluster", "ray", ["ray", "pyarrow"])
    from rich.console import Console

    from voco_llama_hf.integrations.ray import ClusterIndexer
    from voco_llama_hf.store.archives import find_archive

    archive = find_archive(source)
    check_video_extra(file.source for file in archive.files)
    with Console(stderr=True).status("Asking the cluster"):
        indexer = ClusterIndexer(store, model, num_workers, shard_images, eight_bit, **options)
    todo = indexer.select(archive)
    described = indexer.described
    # What tables hold is known when they are read
    number = None if archive.tables else len(todo)
    failures = show(indexer.run(todo, archive.tables), number, described.vision_tokens, described.token_bytes, True)
    num_files = len(archive.files) + len(archive.tables)
    summarize(indexer.store, num_files, failures, described.vision_tokens * described.token_bytes)


def own_device(local_rank: int, number: int) -> str | None:
    """The accelerator of this process among those of its machine, if there is any."""
    import torch

    if number == 1 or not torch.accelerator.is_available():
        return None
    accelerator = cast("torch.device", torch.accelerator.current_accelerator())
    return f"{accelerator.type}:{local_rank % torch.accelerator.device_count()}"


def launch(num_processes: int, args: list[str]) -> None:
    """Runs the command in several processes on this machine."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main(["--standalone", f"--nproc-per-node={num_processes}", "-m", "voco_llama_cli", *args])
    except ChildFailedError as error:
        # Each process has said why
        raise typer.Exit(1) from error


def show(
    results: Iterable[Indexed], number: int | None, vision_tokens: int, token_bytes: int, is_main: bool
) -> dict[str, str]:
    """Progress with images a second and bytes saved; returns what failed on this process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("Indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    failures = {}
    shown = console.is_terminal and is_main
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=number, rates="")
        images = tokens = 0
        for result in results:
            if result.error is not None:
                failures[result.path] = result.error
            images, tokens = images + result.num_images, tokens + result.num_tokens
            rate = images / max(progress.tasks[task].elapsed or 0, 1e-9)
            saved = token_bytes * (images * vision_tokens - tokens)
            progress.update(task, advance=1, rates=f"{rate:.1f} images/s, {human_bytes(saved)} saved")
    return failures


def summarize(store: VoCoStore, num_files: int, failures: dict[str, str], image_bytes: int) -> None:
    """What the store holds now, and what could not be read."""
    for path, error in list(failures.items())[:SHOWN_FAILURES]:
        typer.echo(f"left out {printable(path)}: {printable(error)}", err=True)
    entries = list(store)
    images = sum(entry.num_images if entry.is_video else 1 for entry in entries)
    full = images * image_bytes
    num_failed = len(store.failures())
    typer.echo(
        f"{store.path}: {plural(len(entries), 'entry', 'entries')}, "
        f"{plural(images, 'image or frame', 'images or frames')}"
    )
    typer.echo(f"{plural(num_files, 'file')} found, {num_failed} cannot be read")
    typer.echo(f"key-value cache: {human_bytes(full)} -> {human_bytes(store.nbytes)}")
