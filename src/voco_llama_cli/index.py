"""`voco-llama index`: a folder of images and videos into a store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from .errors import UsageProblem, printable
from .options import (
    DeviceOption,
    DtypeOption,
    FpsOption,
    ModelOption,
    NumFramesOption,
    NumVoCoTokensOption,
    check_sampling_options,
    check_video_extra,
    human_bytes,
    plural,
)


if TYPE_CHECKING:
    from voco_llama_hf.store import VoCoStore
    from voco_llama_hf.store.indexing import Indexed, Indexer


SHOWN_FAILURES = 10


def index(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that is searched for images and videos.")],
    store: Annotated[Path, typer.Option("--store", "-s", help="Folder of the store, made if it is not there.")],
    model: ModelOption = None,
    num_voco_tokens: NumVoCoTokensOption = None,
    num_frames: NumFramesOption = None,
    fps: FpsOption = None,
    eight_bit: Annotated[
        bool | None, typer.Option("--8bit/--no-8bit", help="Keep a new store in 8 bits.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images or frames that are compressed at a time.")] = 16,
    shard_images: Annotated[int, typer.Option(min=1, help="Images or frames of a shard: what a kill can lose.")] = 512,
    num_workers: Annotated[int, typer.Option(min=0, help="Processes that read files ahead.")] = 0,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes that compress, one a device.")] = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Compress every image and video of a folder into a store, to ask about them later.

    voco-llama index photos --store photos.voco --num-voco-tokens 2

    What is stored already is skipped, so an interrupted run goes on where it was. On several machines run
    accelerate launch ... -m voco_llama_cli index FOLDER --store STORE on each.
    """
    if not folder.is_dir():
        raise UsageProblem(f"{folder} is not a folder")
    if store.exists() and not store.is_dir():
        raise UsageProblem(f"{store} is a file: --store takes a folder")
    check_sampling_options(num_frames, fps)
    if num_processes > 1:
        flags = {
            "--store": store,
            "--model": model,
            "--num-voco-tokens": num_voco_tokens,
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
        return launch(num_processes, ["index", str(folder), *args])

    from .loading import find_model, load_model

    name = find_model(model)
    from voco_llama_hf.store.indexing import Indexer, Sampling, find_files
    from voco_llama_hf.store.processes import Processes

    files = find_files(folder)
    check_video_extra(files)
    processes = Processes()
    network, processor = load_model(name, device or own_device(processes.local_rank, processes.number), dtype)
    from voco_llama_hf.modeling.processing_voco_llama import check_num_voco_tokens
    from voco_llama_hf.vision_tokens import count_vision_tokens

    sampling = Sampling(num_frames or (processor.num_frames if fps is None else None), fps)
    count = num_voco_tokens or processor.num_voco_tokens
    check_num_voco_tokens([count])
    indexer = Indexer(
        store, network, processor, count, sampling, eight_bit, batch_size, shard_images, num_workers, processes
    )
    todo = indexer.select(files)
    vision_tokens = count_vision_tokens(network.config)
    failures = show(indexer.run(todo), indexer, len(todo), vision_tokens)
    if processes.is_main:
        summarize(indexer, len(files), failures, vision_tokens)


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


def show(results: Iterable[Indexed], indexer: Indexer, number: int, vision_tokens: int) -> dict[str, str]:
    """Progress with images a second and bytes saved; returns what failed on this process."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("Indexing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rates]}"))
    failures = {}
    shown = console.is_terminal and indexer.processes.is_main
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=number, rates="")
        images = tokens = 0
        for result in results:
            if result.error is not None:
                failures[result.path] = result.error
            images, tokens = images + result.num_images, tokens + result.num_tokens
            rate = images / max(progress.tasks[task].elapsed or 0, 1e-9)
            saved = bytes_of_token(indexer) * (images * vision_tokens - tokens)
            progress.update(task, advance=1, rates=f"{rate:.1f} images/s, {human_bytes(saved)} saved")
    return failures


def bytes_of_token(indexer: Indexer) -> int:
    """Keys and values of a token in the model's own precision."""
    from voco_llama_hf.modeling.configuration_voco_llama import cache_bytes

    return cache_bytes(indexer.model.config, 1, indexer.model.dtype)


def summarize(indexer: Indexer, num_files: int, failures: dict[str, str], vision_tokens: int) -> None:
    """What the store holds now, and what could not be read."""
    store = cast("VoCoStore", indexer.store)
    for path, error in list(failures.items())[:SHOWN_FAILURES]:
        typer.echo(f"left out {printable(path)}: {printable(error)}", err=True)
    entries = list(store)
    images = sum(entry.num_images for entry in entries)
    full = images * vision_tokens * bytes_of_token(indexer)
    num_failed = len(store.failures())
    typer.echo(
        f"{store.path}: {plural(len(entries), 'entry', 'entries')}, "
        f"{plural(images, 'image or frame', 'images or frames')}"
    )
    typer.echo(f"{plural(num_files, 'file')} found, {num_failed} cannot be read")
    typer.echo(f"key-value cache: {human_bytes(full)} -> {human_bytes(store.nbytes)}")
