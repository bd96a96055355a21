"""Draws docs/source/images/attention.png, which model cards show too: who attends to whom, by the package's own mask.

python docs/draw_attention.py
"""

import shutil
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from voco_llama_hf.modeling.attention_voco_llama import voco_mask_function
from voco_llama_hf.modeling.layout_voco_llama import ExpandedLayout, VoCoRuns


TARGET = Path(__file__).parent / "source" / "images" / "attention.png"
CARD_PICTURE = Path(__file__).parents[1] / "src" / "voco_llama_hf" / "hub" / TARGET.name

# A prompt of two images as a user sees it; one letter a token
PROMPT = ["v", "v", "and", "v", "v", "what", "differs", "?"]
COUNTS = [2, 2]
NUM_VISION = 5

COLOURS = {"prefix": "#9aa5b1", "vision": "#f2a541", "suffix": "#c9d1d9", "voco": "#d1495b", "text": "#30638e"}
NAMES = {
    "prefix": "prefix (BOS)",
    "vision": "vision (576 tokens in LLaVA-1.5)",
    "suffix": "suffix (newline)",
    "voco": "VoCo tokens",
    "text": "text",
}
HIDDEN = "#f3f4f6"


def expand_prompt() -> tuple[list[str], list[str], torch.Tensor]:
    """Kind and label of every token of the long sequence, and its mask (queries, keys)."""
    voco_mask = torch.tensor([[token == "v" for token in PROMPT]])
    runs = VoCoRuns.find(voco_mask, COUNTS)
    layout = ExpandedLayout.build(runs, torch.ones_like(voco_mask), 1, [NUM_VISION] * len(runs.rows), 1, mode="voco")
    kinds, labels = ["text"] * layout.length, [""] * layout.length
    for place, token in zip(layout.short[0].tolist(), PROMPT):
        labels[place] = token
    for name in ("prefix", "vision", "suffix"):
        for place in getattr(layout, name).flatten().tolist():
            kinds[place] = name
    for place in layout.short[0, runs.token_columns].tolist():
        kinds[place], labels[place] = "voco", ""
    mask = create_causal_mask(
        config=LlamaConfig(attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(1, layout.length, 1),
        attention_mask=torch.ones(1, layout.length, dtype=torch.bool),
        past_key_values=None,
        and_mask_function=voco_mask_function(*layout.segments(runs, batch_size=1)),
    )
    return kinds, labels, mask[0, 0]


def draw(path: Path) -> None:
    kinds, labels, mask = expand_prompt()
    size = len(kinds)
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    axes = figure.subplots()

    def cell(x: float, y: float, colour: str) -> None:
        axes.add_patch(
            FancyBboxPatch(
                (x + 0.1, y + 0.1), 0.8, 0.8, boxstyle="round,pad=0,rounding_size=0.16", fc=colour, ec="none"
            )
        )

    for query in range(size):
        for key in range(size):
            cell(key, query, COLOURS[kinds[key]] if mask[query, key] else HIDDEN)
    for place, (kind, label) in enumerate(zip(kinds, labels)):
        cell(place, -1.6, COLOURS[kind])
        cell(-1.6, place, COLOURS[kind])
        axes.text(-1.9, place + 0.5, label, ha="right", va="center", fontsize=9, color=COLOURS["text"])
        axes.text(place + 0.5, -1.9, label, ha="center", va="bottom", fontsize=9, color=COLOURS["text"], rotation=90)

    starts = [place for place, kind in enumerate(kinds) if kind == "prefix"]
    width = NUM_VISION + 2 + COUNTS[0]
    for number, start in enumerate(starts, start=1):
        axes.add_patch(Rectangle((start, start), width, width, fill=False, ec="#52606d", lw=1.2))
        axes.text(-1.9, start + width / 2, f"image {number}", ha="right", va="center", fontsize=9, color="#52606d")
        axes.text(start + width / 2, -1.9, f"image {number}", ha="center", va="bottom", fontsize=9, color="#52606d")
        middle = start + width - COUNTS[0] / 2
        axes.plot([middle - 0.9, middle + 0.9], [size + 0.35] * 2, color=COLOURS["voco"], lw=2, solid_capstyle="round")
        axes.text(middle, size + 0.6, "kept", ha="center", va="top", fontsize=9, color=COLOURS["voco"])

    axes.text(size / 2, -4.3, "keys: what is read", ha="center", va="bottom", fontsize=10, color="#323f4b")
    axes.text(-4.9, size / 2, "queries: who reads", ha="right", va="center", rotation=90, fontsize=10, color="#323f4b")
    handles = [Rectangle((0, 0), 1, 1, fc=COLOURS[kind]) for kind in NAMES] + [Rectangle((0, 0), 1, 1, fc=HIDDEN)]
    figure.legend(
        handles,
        [*NAMES.values(), "hidden"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
        handlelength=1,
        handleheight=1,
    )
    axes.set(xlim=(-5.6, size + 0.2), ylim=(size + 1.8, -5.2), aspect="equal")
    axes.set_axis_off()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    draw(TARGET)
    shutil.copyfile(TARGET, CARD_PICTURE)
