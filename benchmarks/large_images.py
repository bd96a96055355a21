"""What compressing large images takes beyond what it cannot do without.

One image of the most vision tokens against the bare passes: vision tower and packing of transformers' own class, and
one causal pass of the language model over V + k tokens. Images of mixed sizes in one call against the same ones alone.

    python benchmarks/large_images.py --output benchmarks/results/large_images_cpu.json
    python benchmarks/large_images.py --preset llava-next-7b --device cuda --dtype bfloat16
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig

from voco_llama_hf import VoCoLlamaConfig
from voco_llama_hf.benchmark.measure import Timing, alternate
from voco_llama_hf.benchmark.presets import CLIP_LARGE_336, PRESETS, build_model
from voco_llama_hf.benchmark.results import about
from voco_llama_hf.files import written_aside
from voco_llama_hf.llava import as_llava
from voco_llama_hf.modeling.tiles_voco_llama import count_tiles
from voco_llama_hf.vision_tokens import count_vision_tokens, largest_size


# Heights and widths: wide, high, square, small, each twice and among others
MIXED = [(480, 640), (1200, 400), (300, 300), (768, 1024), (400, 1200), (640, 480), (1000, 1000), (200, 900)] * 2
SMALL = "small"


def small() -> VoCoLlamaConfig:
    """The tiles of LLaVA-NeXT before towers that a CPU runs in seconds, where what is added weighs more than at 7B."""
    text = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=2, num_attention_heads=8, vocab_size=32064
    )
    small_tower = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 2}
    vision = CLIPVisionConfig(**{**CLIP_LARGE_336, **small_tower})
    return VoCoLlamaConfig(text_config=text, vision_config=vision, base_model_type="llava_next")


def draw(model: Any, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Random images of these heights and widths, as processors return them."""
    config, side = model.config, model.config.vision_config.image_size
    counts = [count_tiles(size, config.image_grid_pinpoints, side) for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, side, side, dtype=model.dtype, device=model.device)
    for image, count in zip(pixels, counts):
        image[:count].normal_()
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


@torch.no_grad()
def run_bare_passes(model: Any, llava: Any, images: dict[str, torch.Tensor], num_voco_tokens: int) -> None:
    """With transformers' own class."""
    features = torch.stack(list(llava.get_image_features(**images).pooler_output))
    voco = features.new_zeros(len(features), num_voco_tokens, features.shape[-1])
    model.model.language_model(inputs_embeds=torch.cat([features, voco], dim=1), use_cache=False)


def record(timing: Timing) -> dict[str, float]:
    return {"seconds": timing.median, "processor_seconds": timing.processor_median, "spread": timing.spread}


def main(
    preset: Annotated[str, typer.Option(help=f"{SMALL}, or one of {', '.join(PRESETS)}.")] = SMALL,
    device: str = "cpu",
    dtype: str = "float32",
    num_voco_tokens: int = 1,
    rounds: int = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure compressing large images."""
    console = Console(width=100)
    with console.status("Drawing random weights"):
        config = small() if preset == SMALL else PRESETS[preset]()
        model = build_model(config, device, getattr(torch, dtype))
    llava = as_llava(model)

    def compress(images: dict[str, torch.Tensor], exact: bool = True) -> None:
        options = {"num_voco_tokens": num_voco_tokens, "batch_size": len(MIXED), "show_progress": False}
        model.compress(**images, **options, exact=exact)

    large, mixed = draw(model, [largest_size(config)]), draw(model, MIXED)
    alone = [draw(model, [size]) for size in MIXED]
    pairs = {
        "one image / bare passes": (
            {
                "bare passes": lambda: run_bare_passes(model, llava, large, num_voco_tokens),
                "one image": lambda: compress(large),
            },
            3 * rounds,
        ),
        # Servers read all weights for the fingerprint once, not for every image
        "weights known / bare passes": (
            {
                "bare passes": lambda: run_bare_passes(model, llava, large, num_voco_tokens),
                "one image, weights known": lambda: compress(large, exact=False),
            },
            3 * rounds,
        ),
        "together / one by one": (
            {
                "mixed sizes, one by one": lambda: [compress(images) for images in alone],
                "mixed sizes together": lambda: compress(mixed),
            },
            rounds,
        ),
    }
    timings: dict[str, Timing] = {}
    ratios: dict[str, dict[str, float]] = {}
    with console.status("Measuring") as status:
        for name, (calls, turns) in pairs.items():
            found = alternate(calls, turns, model.device, lambda text: status.update(f"Measuring: {text}"))
            base, measured = found.values()
            # A busy machine changes the time of the processor less than that on the wall
            ratios[name] = {
                "seconds": measured.median / base.median,
                "processor_seconds": measured.processor_median / base.processor_median,
            }
            timings |= found
    tokens = [count_vision_tokens(config, size) for size in MIXED]
    console.print(
        f"{preset}: {count_vision_tokens(config):,} vision tokens; {len(MIXED)} images of {sorted(set(tokens))}"
    )
    for name, timing in timings.items():
        console.print(f"{name:>27}  {timing.median:8.3f} s  (processor {timing.processor_median:.3f} s)")
    for name, ratio in ratios.items():
        console.print(f"{name:>27}  {ratio['seconds']:8.3f}    (processor {ratio['processor_seconds']:.3f})")
    if output is not None:
        settings = {"num_voco_tokens": num_voco_tokens, "rounds": rounds, "vision_tokens_of_mixed": tokens}
        times = {name: record(timing) for name, timing in timings.items()}
        with written_aside(output) as part:
            written = {**about(preset, model, model.dtype), **settings, "times": times, "ratios": ratios}
            part.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
