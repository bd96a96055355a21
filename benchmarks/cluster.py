"""What an archive of many images costs: images a second in one process, two, and on Ray; and how a store grows.

Images a second leave out what starting takes: they are counted from the first shard that is written to the last.
Growth is measured with entries of a few numbers, so that what is measured is the index: its bytes, and the time to
open the store, to find a file by its name, to get an entry, and to take in the shards of a cluster.

    python benchmarks/cluster.py rates --output benchmarks/results/cluster_rates_cpu.json
    python benchmarks/cluster.py growth --output benchmarks/results/cluster_growth_cpu.json --plot growth.png
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from voco_llama_hf import VoCoCache
from voco_llama_hf.scenes.still import make_scene
from voco_llama_hf.store import Content, VoCoStore
from voco_llama_hf.store.shards import write_shard


FINGERPRINT = {"weights": "abc", "layers": "1"}
SHARD = 512
VARIANTS = {
    "one process": [],
    "two processes": ["--num-processes", "2"],
    "Ray, two": ["--cluster", "--num-processes", "2"],
}
GROWTH = ("index", "adopt", "open", "find", "get", "select")
app = typer.Typer()


def record(output: Path | None, figures: dict[str, Any]) -> None:
    if output is not None:
        about = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        output.write_text(json.dumps(about | figures, indent=2) + "\n")


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@app.command()
def rates(
    images: Annotated[int, typer.Option(help="Images to index.")] = 512,
    shard_images: Annotated[int, typer.Option(help="Images of a shard.")] = 32,
    rounds: int = 1,
    output: Path | None = None,
) -> None:
    """Images a second of `voco-llama index`: runs that take turns, each in processes of its own."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "photos")
        folder.mkdir()
        for i in range(images):
            scene: dict[str, Any] = make_scene("test", i)
            scene["image"].save(folder / f"{i}.png")
        for turn in range(rounds):
            for variant, options in VARIANTS.items():
                store = Path(name, f"{variant} {turn}")
                command = [
                    sys.executable,
                    "-m",
                    "voco_llama_cli",
                    "index",
                    str(folder),
                    "--store",
                    str(store),
                    *options,
                ]
                command += ["--device", "cpu", "--shard-images", str(shard_images)]
                took = seconds(
                    lambda run=command: subprocess.run(run, check=True, env=environment, capture_output=True)
                )
                written = sorted(path.stat().st_mtime for path in (store / "shards").iterdir())
                with VoCoStore(store) as opened:
                    assert len(opened) == images
                first = shard_images * (
                    2 if options else 1
                )  # what was done before the clock starts: a shard of each worker
                found[variant].append(((images - first) / (written[-1] - written[0]), took))
                print(variant, found[variant][-1], flush=True)
    table = Table("", "images/s", "seconds in all")
    figures = {}
    for variant, runs in found.items():
        rate, took = (statistics.median(values) for values in zip(*runs))
        figures[variant] = {"images_per_second": rate, "seconds_in_all": took}
        table.add_row(variant, f"{rate:.1f}", f"{took:.1f}")
    Console(width=100).print(table)
    record(output, {"images": images, "shard_images": shard_images, "rounds": rounds, "rates": figures})


def grow(folder: Path, number: int) -> dict[str, float]:
    """A store of so many entries, in shards that workers have left, and what is done with it."""
    with VoCoStore(folder, FINGERPRINT) as store:
        shards = store.shards
    keys = torch.randn(number, 1, 1, 4)
    for first in range(0, number, SHARD):
        some = range(first, min(first + SHARD, number))
        contents = [Content(f"{i:064x}", "", f"/photos/{i % 100}/{i}.png", 1_000, 1) for i in some]
        caches = [VoCoCache(keys[i : i + 1], keys[i : i + 1], [1], FINGERPRINT) for i in some]
        write_shard(shards, contents, caches, eight_bit=False)
    figures = {"adopt": seconds(lambda: VoCoStore(folder, FINGERPRINT).close())}
    figures["open"] = statistics.median(seconds(lambda: VoCoStore(folder, FINGERPRINT).close()) for _ in range(5))
    figures["index"] = (folder / "index.sqlite").stat().st_size
    with VoCoStore(folder, FINGERPRINT) as store:
        assert len(store) == number
        some = [i * (number // 20) for i in range(20)]
        figures["find"] = statistics.median(seconds(lambda i=i: store.find(f"{i}.png")) for i in some)
        figures["get"] = statistics.median(seconds(lambda i=i: store.get(f"{i:064x}")) for i in some)

        def select() -> None:
            """What a second run does before it starts."""
            for i in range(number):
                store.is_known(f"/photos/{i % 100}/{i}.png", 1, "", 1_000, 1)

        figures["select"] = seconds(select)
    return figures


def plot_growth(sizes: list[int], figures: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {
        "adopt": "take in all shards",
        "select": "look what is new",
        "find": "find a name",
        "open": "open",
        "get": "get an entry",
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, label in labels.items():
        left.loglog(sizes, [one[name] for one in figures], marker="o", label=label)
    left.set(xlabel="entries", ylabel="seconds", title="Time")
    left.legend(fontsize=8)
    right.loglog(sizes, [one["index"] / 1e6 for one in figures], marker="o", color="black")
    right.set(xlabel="entries", ylabel="MB", title="Bytes of the index")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


@app.command()
def growth(
    sizes: Annotated[str, typer.Option(help="Numbers of entries.")] = "1000,3000,10000,30000,100000",
    output: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Bytes of the index and times, from a small store to a large one."""
    numbers = [int(number) for number in sizes.split(",")]
    table = Table("entries", *GROWTH)
    figures = []
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            found = grow(Path(folder, "store"), number)
        figures.append(found)
        cells = [
            f"{found[name] / 1e6:.2f} MB" if name == "index" else f"{1e3 * found[name]:.2f} ms" for name in GROWTH
        ]
        table.add_row(f"{number:,}", *cells)
    Console(width=110).print(table)
    record(output, {"entries": numbers, "growth": figures})
    if plot is not None:
        plot_growth(numbers, figures, plot)


if __name__ == "__main__":
    app()
