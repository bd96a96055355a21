"""`voco-llama store`: what is in a store, whether it is whole, and what is to go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import UsageProblem, printable
from .options import check_extra, human_bytes, plural


if TYPE_CHECKING:
    from voco_llama_hf.store import Entry


store_app = typer.Typer(
    help="Look into a store of compressed images, check it, remove from it.", invoke_without_command=True
)
StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder of the store. A URL, as s3://bucket/photos.voco, is read only.")
]


@store_app.callback()
def main(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@store_app.command()
def info(
    store: StoreArgument,
    files: Annotated[bool, typer.Option("--files", help="Also list what is stored, one line an entry.")] = False,
) -> None:
    """Print what a store holds, by which model, and what could not be read."""
    from voco_llama_hf.store import VoCoStore

    with VoCoStore(store) as opened:
        entries = list(opened)
        videos = [entry for entry in entries if entry.is_video]
        kept = "8 bits" if opened.eight_bit else "as computed"
        number = plural(len(entries), "entry", "entries")
        typer.echo(f"{store}: {number}, {human_bytes(opened.nbytes)}, keys and values {kept}")
        typer.echo(f"images: {len(entries) - len(videos)}")
        typer.echo(f"videos: {len(videos)}, {plural(sum(entry.num_images for entry in videos), 'frame')}")
        counts = Counter(entry.num_voco_tokens for entry in entries)
        typer.echo("VoCo tokens: " + (", ".join(f"k={k} {number}" for k, number in sorted(counts.items())) or "none"))
        # Settings are pages of JSON
        told = {name: value for name, value in opened.fingerprint.items() if not value.startswith("{")}
        made_by = ", ".join(f"{name} {value}" for name, value in told.items())
        typer.echo(f"model: {printable(made_by)}")
        for source, error in opened.failures().items():
            typer.echo(f"failed: {printable(source)}: {printable(error)}")
        for name, error in opened.left_out.items():
            typer.echo(f"left out: {printable(name)}: {printable(error)}")
        if files:
            for entry in entries:
                address = f"{entry.content_hash[:12]} k={entry.num_voco_tokens} {entry.sampling}".strip()
                typer.echo(printable(f"{address} {', '.join(entry.sources)}"))


@store_app.command()
def verify(
    store: StoreArgument,
    remove_damaged: Annotated[
        bool, typer.Option("--remove-damaged", help="Remove damaged entries, for `voco-llama index` to make again.")
    ] = False,
) -> None:
    """Read every entry and compare it with its checksum; ends with exit code 1 if one is damaged."""
    from rich.console import Console
    from rich.progress import track

    from voco_llama_hf.store import DamagedError, VoCoStore

    console = Console(stderr=True)
    with VoCoStore(store) as opened:
        damaged, unread = [], 0
        for entry, problem in track(
            opened.verify(), "Verifying", len(opened), console=console, transient=True, disable=not console.is_terminal
        ):
            if problem is None:
                continue
            name = printable(name_of(entry))
            if isinstance(problem, DamagedError):
                damaged.append(entry)
                typer.echo(f"damaged: {name}: {printable(problem)}", err=True)
            else:
                unread += 1
                typer.echo(f"cannot be read: {name}: {printable(problem)}", err=True)
        number = plural(len(opened), "entry", "entries")
        if remove_damaged:
            for entry in damaged:
                opened.remove(entry.content_hash, entry.num_voco_tokens, entry.sampling)
    removed = " and removed" if damaged and remove_damaged else ""
    unreadable = f", {unread} cannot be read" if unread else ""
    typer.echo(f"{store}: {number}, {len(damaged)} damaged{removed}{unreadable}")
    if unread or (damaged and not remove_damaged):
        raise typer.Exit(1)


@store_app.command()
def remove(
    store: StoreArgument,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Files, or first digits of their hashes.")],
) -> None:
    """Remove images and videos, at every k, and free their bytes."""
    from voco_llama_hf.store import VoCoStore

    with VoCoStore(store) as opened:
        hashes = [entry.content_hash for name in names for entry in find(opened, name)]
        number = sum(opened.remove(content_hash) for content_hash in dict.fromkeys(hashes))
        removed = f"{plural(number, 'entry', 'entries')} removed"
        try:
            freed = opened.compact()
        except OSError as error:
            raise RuntimeError(f"{removed}, but their bytes could not be freed: {error}") from error
    typer.echo(f"{store}: {removed}, {human_bytes(max(freed, 0))} freed")


@store_app.command()
def compact(store: StoreArgument) -> None:
    """Write small shards together into large ones."""
    from voco_llama_hf.store import VoCoStore

    with VoCoStore(store) as opened:
        freed = opened.compact()
    typer.echo(f"{store}: {human_bytes(max(freed, 0))} freed")


@store_app.command()
def export(
    store: StoreArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write, new or empty.")],
) -> None:
    """Write a store as Parquet files, which `datasets` reads: an archive as a data set of the Hub."""
    check_extra("a Parquet file", "parquet", ["pyarrow"])
    from voco_llama_hf.store import VoCoStore
    from voco_llama_hf.store.parquet import export_parquet

    with VoCoStore(store) as opened:
        number = len(opened)
        left_out = show_progress(
            "Exporting", ((name_of(entry), problem) for entry, problem in export_parquet(opened, output)), number
        )
    written = sum(path.stat().st_size for path in (output / "data").iterdir())
    typer.echo(f"{output}: {plural(number - left_out, 'entry', 'entries')}, {human_bytes(written)}")
    if left_out:
        raise typer.Exit(1)


@store_app.command("import")
def import_(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Parquet files, folders of them, or their URLs.")
    ],
    store: Annotated[Path, typer.Option("--store", "-s", help="Folder of the store, made if it is not there.")],
    eight_bit: Annotated[
        bool | None, typer.Option("--8bit/--no-8bit", help="Keep a new store in 8 bits.", show_default=False)
    ] = None,
) -> None:
    """Put Parquet files of compressed images into a store; ends with exit code 1 if rows are left out."""
    check_extra("a Parquet file", "parquet", ["pyarrow"])
    if store.exists() and not store.is_dir():
        raise UsageProblem(f"{store} is a file: --store takes a folder")
    from voco_llama_hf.store import VoCoStore
    from voco_llama_hf.store.parquet import import_parquet

    left_out = show_progress("Importing", import_parquet(sources, store, eight_bit=eight_bit))
    if (store / "index.sqlite").exists():
        with VoCoStore(store) as opened:
            typer.echo(f"{store}: {plural(len(opened), 'entry', 'entries')}, {human_bytes(opened.nbytes)}")
    if left_out:
        raise typer.Exit(1)


def name_of(entry: Entry) -> str:
    return ", ".join(entry.sources) or entry.content_hash


def show_progress(what: str, results: Iterable[tuple[str, Exception | None]], number: int | None = None) -> int:
    """Names what is left out, on stderr, and returns how many."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    left_out = 0
    for name, problem in track(
        results, what, number, console=console, transient=True, disable=not console.is_terminal
    ):
        if problem is not None:
            left_out += 1
            typer.echo(f"left out {printable(name)}: {printable(problem)}", err=True)
    return left_out


def find(store, name: str, num_voco_tokens: int | None = None, per_tile: bool = False) -> list:
    """
    The entries of one content; with so many VoCo tokens of an image, or else of each of its tiles, if they are named.

    Raises:
        UsageProblem: if there is none of that name, or several contents.
    """
    entries = store.find(name)
    if num_voco_tokens is not None:
        entries = [entry for entry in entries if entry.num_voco_tokens == num_voco_tokens]
        entries = [entry for entry in entries if entry.is_video or entry.is_in_tiles == per_tile]
    if not entries:
        at_k = "" if num_voco_tokens is None else f" with {plural(num_voco_tokens, 'VoCo token')}"
        at_k += " of every tile" if per_tile else ""
        raise UsageProblem(f"{store.path} has no {name!r}{at_k}; voco-llama store info --files lists what it has")
    if len({entry.content_hash for entry in entries}) > 1:
        sources = ", ".join(entry.sources[0] if entry.sources else entry.content_hash[:12] for entry in entries)
        raise UsageProblem(f"{name!r} can be any of {sources}: give more of its path")
    return entries


def find_one(store, name: str, num_voco_tokens: int | None, per_tile: bool):
    """
    One entry, see [`find`].

    Raises:
        UsageProblem: if there is none, or several.
    """
    entries = find(store, name, num_voco_tokens, per_tile)
    if len(entries) > 1:
        found = ", ".join(f"k={entry.num_voco_tokens} {entry.sampling}".strip() for entry in entries)
        raise UsageProblem(
            f"{name!r} is stored more than once ({found}): choose with --num-voco-tokens or --num-voco-tokens-per-tile"
        )
    return entries[0]
