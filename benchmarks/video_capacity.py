"""Frames that fit into a context window and a GPU, computed from real configurations.

Nothing is measured: an uncompressed image takes V positions of the window and V keys and values, a compressed one k.

    python benchmarks/video_capacity.py
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


BYTES = 2  # of a number in 16 bits
VISION_TOKENS = 576  # CLIP ViT-L/14 at 336 pixels
TEXT_TOKENS = 128  # left for the question and the answer
WINDOWS = (4096, 32768)
MINI_FRAMES, MINI_MEMORY = 10_000, 24 * 2**30  # what LLaVA-Mini (arXiv 2501.03895) reports, at one token a frame


@dataclass(frozen=True)
class TextModel:
    """The part of a configuration that keys, values and weights follow from."""

    name: str
    layers: int
    key_value_heads: int
    head_dim: int
    parameters: float

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.key_value_heads * self.head_dim * BYTES


# Vicuna-7B as in LLaVA-1.5, with vision tower and projector; Llama-3.1-8B
VICUNA = TextModel("LLaVA-1.5-7B", 32, 32, 128, 7.06e9)
LLAMA = TextModel("Llama-3.1-8B (grouped queries)", 32, 8, 128, 8.35e9)


def main() -> None:
    table = Table(title="Video at 336 px, 16 bits")
    for heading in ("model", "tokens a frame", *(f"frames in {window:,}" for window in WINDOWS), "1,000 frames"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    rows = [(VICUNA, "uncompressed", VISION_TOKENS), *((VICUNA, f"VoCo k={k}", k) for k in (1, 2, 8))]
    rows += [(LLAMA, "uncompressed", VISION_TOKENS), *((LLAMA, f"VoCo k={k}", k) for k in (1, 2, 8))]
    for model, name, tokens in rows:
        fits = [f"{(window - TEXT_TOKENS) // tokens:,}" for window in WINDOWS]
        table.add_row(
            f"{model.name}, {name}", str(tokens), *fits, f"{1000 * tokens * model.token_bytes / 1e9:,.3f} GB"
        )
    console = Console(width=120)
    console.print(table)

    console.print(
        f"\n{MINI_FRAMES:,} frames held in {MINI_MEMORY / 2**30:.0f} GiB (a question sees as many as its window):"
    )
    for model in (VICUNA, LLAMA):
        weights = model.parameters * BYTES
        for k in (1, 2):
            cache = MINI_FRAMES * k * model.token_bytes
            room = (MINI_MEMORY - weights) / (k * model.token_bytes)
            console.print(
                f"  {model.name}, k={k}: {weights / 2**30:.1f} GiB weights + {cache / 2**30:.1f} GiB frames = "
                f"{(weights + cache) / 2**30:.1f} GiB; room for {room:,.0f}"
            )


if __name__ == "__main__":
    main()
