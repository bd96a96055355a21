"""The results as tables on screen and in Markdown, and as a plot beside the paper's figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .question import FULL_CACHE, LIMIT, NO_CACHE, VOCO_CACHE, WAYS


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Reductions against no cache in percent, on one A100: paper, Table 7
PAPER = {
    FULL_CACHE: {"FLOPs": 87.5, "kernel time": 64.8},
    VOCO_CACHE: {"FLOPs": 94.8, "kernel time": 69.6},
}
PAPER_CACHE_REDUCTION = 99.8  # of the VoCo cache against the full one
NOT_MEASURED = "not measured"
GPU_MEMORY = (24, 80)  # GiB, to draw where a cache stops fitting


@dataclass(frozen=True)
class Sheet:
    """A table of texts: headings, and rows whose first cells are names."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def print(self, console: Console) -> None:
        table = Table(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{self.markdown_table()}"

    def markdown_table(self) -> str:
        lines = [self.headings, ["---", *["---:"] * (len(self.headings) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_sheets(results: dict[str, Any]) -> list[Sheet]:
    """The tables of all that was counted and measured; `results` is what the JSON file holds."""
    sheets = [cost_sheet(results, k) for k in results["costs"]]
    sheets += [
        first_token_sheet(results, batch_size, cache)
        for batch_size, cache in sorted({(r["batch_size"], r["cache"]) for r in results["first_token"]})
    ]
    if results["decoding"]:
        sheets.append(decoding_sheet(results))
    sheets += [compression_sheet(results), many_images_sheet(results)]
    return sheets


def cost_sheet(results: dict[str, Any], k: str) -> Sheet:
    """FLOPs and bytes, which are exact."""
    costs = results["costs"][k]
    rows = []
    for way in WAYS:
        flops, kept = costs[way]["flops"], costs[way]["cache_bytes"]
        rows.append(
            [
                way,
                f"{kept / 1e6:,.3f} MB" if kept else "-",
                reduction(kept, costs[FULL_CACHE]["cache_bytes"]) if way == VOCO_CACHE else "-",
                f"{flops / 1e12:.4g} T",
                "-" if way == NO_CACHE else reduction(flops, costs[NO_CACHE]["flops"]),
                f"{flops / costs[LIMIT]['flops']:.3f}x",
            ]
        )
    title = f"{results['model']}: a question of {results['prompt_tokens']} tokens about one image, k = {k}, counted"
    headings = ["", "cache", "against full", "FLOPs", "against no cache", "against text only"]
    return Sheet(title, headings, rows)


def first_token_sheet(results: dict[str, Any], batch_size: int, cache: str) -> Sheet:
    records = {
        record["way"]: record
        for record in results["first_token"]
        if (record["batch_size"], record["cache"]) == (batch_size, cache)
    }
    limit, rows = records[LIMIT], []
    for way, record in records.items():
        kernel = record["kernel_seconds"]
        without = records[NO_CACHE]["kernel_seconds"] if NO_CACHE in records else None
        rows.append(
            [
                way,
                f"{1e3 * record['seconds']:.1f} ms ±{record['spread']:.0%}",
                f"{record['seconds'] / limit['seconds']:.3f}x",
                f"{record['processor_seconds'] / limit['processor_seconds']:.3f}x",
                NOT_MEASURED if kernel is None else f"{1e3 * kernel:.1f} ms",
                "-" if kernel is None or without is None or way == NO_CACHE else reduction(kernel, without),
                NOT_MEASURED if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**30:.2f} GiB",
            ]
        )
    headings = [
        "",
        "first token",
        "against text only",
        "processor",
        "kernel time",
        "against no cache",
        "peak memory",
    ]
    title = f"Time to first token, batch of {batch_size}, {cache} cache, {about_run(results)}"
    return Sheet(title, headings, rows)


def decoding_sheet(results: dict[str, Any]) -> Sheet:
    rows = []
    reading = results["weight_reading"]
    for record in results["decoding"]:
        speed, peak = record["tokens_per_second"], record["peak_bytes"]
        rows.append(
            [
                f"{record['way']}, {record['cache']}",
                str(record["batch_size"]),
                "lost in noise" if speed is None else f"{speed:,.1f}",
                "-" if speed is None else f"{record['batch_size'] / speed / reading['seconds']:.2f}x",
                NOT_MEASURED if peak is None else f"{peak / 2**30:.2f} GiB",
            ]
        )
    for record in results["largest_batches"]:
        rows.append([f"{record['way']}, {record['cache']}", f"{record['batch_size']} (the largest)", "", "", ""])
    title = f"Decoding, {about_run(results)}; reading the weights once takes {1e3 * reading['seconds']:.1f} ms"
    headings = ["", "batch", "tokens/s", "a step against reading the weights", "peak memory"]
    return Sheet(title, headings, rows)


def compression_sheet(results: dict[str, Any]) -> Sheet:
    rows = []
    for k, counted in results["compression_flops"].items():
        ratio = counted["compress"] / counted["bare passes"]
        rows.append([f"compress, k = {k}, counted", "1", f"{counted['compress'] / 1e12:.4g} TFLOPs", f"{ratio:.4f}x"])
    bare = {r["batch_size"]: r for r in results["compression"] if r["what"] == "bare passes"}
    for record in results["compression"]:
        size = record["batch_size"]
        rate = size / record["seconds"]
        cells = [f"{rate:,.2f} images/s ±{record['spread']:.0%}", f"{record['seconds'] / bare[size]['seconds']:.3f}x"]
        rows.append([record["what"], str(size), *cells])
    title = "Compressing, against vision tower and one causal pass over V + k tokens"
    return Sheet(title, ["", "batch", "", "against bare passes"], rows)


def many_images_sheet(results: dict[str, Any]) -> Sheet:
    measured = {(r["way"], r["num_images"]): r for r in results["many_images"]}
    rows = []
    for costs in results["many_images_costs"]:
        for way in (FULL_CACHE, VOCO_CACHE):
            record = measured.get((way, costs["num_images"]))
            needed = results["weight_bytes"] + costs[way]["cache_bytes"]
            rows.append(
                [
                    f"{costs['num_images']:,} images, {way}",
                    f"{costs[way]['flops'] / 1e12:.4g} T",
                    f"{needed / 2**30:,.1f} GiB",
                    " ".join(f"{gib} GiB" for gib in GPU_MEMORY if needed < gib * 2**30) or "neither",
                    NOT_MEASURED if record is None else f"{1e3 * record['seconds']:.1f} ms ±{record['spread']:.0%}",
                ]
            )
    title = f"Many images, a question of {results['prompt_tokens']} tokens, {about_run(results)}"
    headings = ["", "FLOPs", "weights and cache", f"fits into {' or '.join(map(str, GPU_MEMORY))} GiB", "first token"]
    return Sheet(title, headings, rows)


def reduction(value: float, reference: float) -> str:
    return f"-{100 * (1 - value / reference):.1f} %"


def about_run(results: dict[str, Any]) -> str:
    return f"{results['hardware']}, {results['dtype']}"


def plot_results(results: dict[str, Any], path: Path) -> None:
    """Draws reductions beside the paper's, and the cost of many images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    bars, flops, memory = figure.subplots(1, 3)
    plot_reductions(results, bars)
    points = results["many_images_costs"]
    numbers = [point["num_images"] for point in points]
    for way, colour in ((FULL_CACHE, "tab:orange"), (VOCO_CACHE, "tab:blue")):
        flops.plot(numbers, [p[way]["flops"] / 1e12 for p in points], marker="o", color=colour, label=way)
        needed = [(results["weight_bytes"] + p[way]["cache_bytes"]) / 2**30 for p in points]
        memory.plot(numbers, needed, marker="o", color=colour, label=way)
    for gib in GPU_MEMORY:
        memory.axhline(gib, color="0.7", linestyle="--", linewidth=1)
        memory.annotate(f"{gib} GiB", (numbers[0], gib), color="0.4", va="bottom", fontsize=8)
    flops.set(title="FLOPs to the first token, counted", xlabel="images in the prompt", ylabel="TFLOPs")
    memory.set(title="weights and cache, counted", xlabel="images in the prompt", ylabel="GiB")
    for panel in (flops, memory):
        panel.set(xscale="log", yscale="log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter("")
        panel.legend(frameon=False)
    for panel in (bars, flops, memory):
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['model']}, k = {results['num_voco_tokens'][0]}")
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=150, format=path.suffix[1:])
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plot_reductions(results: dict[str, Any], panel: "Axes") -> None:
    """Bars of this run beside the paper's; what was not measured has none."""
    costs = next(iter(results["costs"].values()))
    kernels = {
        record["way"]: record["kernel_seconds"]
        for record in results["first_token"]
        if record["batch_size"] == 1 and record["cache"] == "dynamic" and record["kernel_seconds"] is not None
    }
    names, here, paper = [], [], []
    for way in (FULL_CACHE, VOCO_CACHE):
        names += [f"FLOPs\n{way}", f"kernel time\n{way}"]
        paper += [PAPER[way]["FLOPs"], PAPER[way]["kernel time"]]
        here.append(100 * (1 - costs[way]["flops"] / costs[NO_CACHE]["flops"]))
        here.append(100 * (1 - kernels[way] / kernels[NO_CACHE]) if way in kernels else None)
    names.append("cache bytes\nVoCo, full")
    paper.append(PAPER_CACHE_REDUCTION)
    here.append(100 * (1 - costs[VOCO_CACHE]["cache_bytes"] / costs[FULL_CACHE]["cache_bytes"]))
    for place, (value, reported) in enumerate(zip(here, paper, strict=True)):
        panel.barh(place + 0.2, reported, 0.38, color="0.75", label="paper, Table 7" if place == 0 else None)
        panel.annotate(f"{reported:.1f}", (reported + 1, place + 0.2), va="center", fontsize=8)
        if value is None:
            panel.annotate(NOT_MEASURED, (1, place - 0.2), va="center", fontsize=8, color="0.4")
        else:
            panel.barh(place - 0.2, value, 0.38, color="tab:blue", label="here" if place == 0 else None)
            panel.annotate(f"{value:.1f}", (value + 1, place - 0.2), va="center", fontsize=8)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlim=(0, 115), xlabel="%", title="less than without a cache")
    panel.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.3), ncols=2, fontsize=8)
