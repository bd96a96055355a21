"""Draws docs/source/images/positions.png: the two stages, with the positions that the package itself computes.

python docs/draw_positions.py
"""

import torch
from draw_attention import COLOURS, COUNTS, NAMES, NUM_VISION, PROMPT, TARGET
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from voco_llama_hf.modeling.layout_voco_llama import ExpandedLayout, VoCoRuns


GREY = "#52606d"
SEGMENT = NUM_VISION + 2 + COUNTS[0]


def cell(axes: Axes, x: float, y: float, kind: str, number: int, faded: bool = False) -> None:
    box = FancyBboxPatch(
        (x + 0.08, y + 0.08), 0.84, 0.84, boxstyle="round,pad=0,rounding_size=0.16", fc=COLOURS[kind], ec="none"
    )
    box.set_alpha(0.35 if faded else 1)
    axes.add_patch(box)
    dark = kind in ("suffix", "vision", "prefix") or faded
    axes.text(
        x + 0.5, y + 0.5, str(number), ha="center", va="center", fontsize=8, color="#323f4b" if dark else "white"
    )


def compute() -> tuple[list[list[tuple[str, int]]], list[tuple[str, int]]]:
    """Kind and position of every token: of each segment as it is compressed, and of the short sequence."""
    voco_mask = torch.tensor([[token == "v" for token in PROMPT]])
    runs = VoCoRuns.find(voco_mask, COUNTS)
    layout = ExpandedLayout.build(runs, torch.ones_like(voco_mask), 1, [NUM_VISION] * len(COUNTS), 1, mode="voco")
    short = torch.arange(len(PROMPT))[None]
    placed = layout.compact_positions(short, runs)[0]
    segments = []
    for image in range(len(COUNTS)):
        own = layout.short[0, runs.token_columns[runs.token_images == image]]
        vision = layout.vision[layout.vision_images == image]
        parts = {"prefix": layout.prefix[image], "vision": vision, "suffix": layout.suffix[image]}
        tokens = [(kind, place) for kind, places in {**parts, "voco": own}.items() for place in places.tolist()]
        # Compressed on its own an image starts counting at its first VoCo token
        first = placed[own[0]].item()
        segments.append([(kind, placed[place].item() - first) for kind, place in tokens])
    kinds = ["voco" if token == "v" else "text" for token in PROMPT]
    return segments, list(zip(kinds, short[0].tolist()))


def draw() -> None:
    segments, short = compute()
    figure = Figure(figsize=(7.6, 3.7), layout="constrained")
    axes = figure.subplots()
    width = 2 * SEGMENT + 2.0
    title = "1. Compress: every image on its own, once"
    axes.text(width / 2, -0.5, title, ha="center", va="bottom", fontsize=10, color="#323f4b")
    starts = [0.0, SEGMENT + 2.0]
    for number, (start, tokens) in enumerate(zip(starts, segments), start=1):
        for offset, (kind, position) in enumerate(tokens):
            cell(axes, start + offset, 0, kind, position, faded=kind != "voco")
        axes.text(start - 0.3, 0.5, f"image {number}", ha="right", va="center", fontsize=9, color=GREY)
        dropped = SEGMENT - COUNTS[number - 1]
        axes.plot([start + 0.1, start + dropped - 0.5], [1.25] * 2, color=GREY, lw=1)
        axes.text(start + dropped / 2, 1.4, "forgotten", ha="center", va="top", fontsize=9, color=GREY)

    left = (width - len(short)) / 2
    top = 4.4
    title = "2. Ask: the short sequence, which is all that its cache holds"
    axes.text(width / 2, top + 1.9, title, ha="center", va="top", fontsize=10, color="#323f4b")
    taken = 0
    for column, (kind, position) in enumerate(short):
        cell(axes, left + column, top, kind, position)
        if kind == "text":
            word, middle = PROMPT[column], left + column + 0.5
            axes.text(middle, top + 1.1, word, ha="center", va="top", fontsize=7.5, color=COLOURS["text"])
        else:
            image, offset = divmod(taken, COUNTS[0])
            taken += 1
            source = starts[image] + SEGMENT - COUNTS[0] + offset + 0.5
            axes.annotate(
                "",
                xy=(left + column + 0.5, top - 0.02),
                xytext=(source, 1.05),
                arrowprops={"arrowstyle": "-|>", "color": COLOURS["voco"], "lw": 1.1, "alpha": 0.75},
            )
    axes.text(
        width,
        2.9,
        "keys rotated to\ntheir new position",
        ha="right",
        va="center",
        fontsize=9,
        color=COLOURS["voco"],
    )
    figure.legend(
        [Rectangle((0, 0), 1, 1, fc=COLOURS[kind]) for kind in NAMES],
        NAMES.values(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1,
        handleheight=1,
    )
    axes.set(xlim=(-2.6, width + 0.2), ylim=(top + 2.6, -1.3), aspect="equal")
    axes.set_axis_off()
    figure.savefig(TARGET.with_name("positions.png"), dpi=160)


if __name__ == "__main__":
    draw()
