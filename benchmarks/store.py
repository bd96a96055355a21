"""What a store costs and saves, as ratios measured side by side.

Indexing: images a second of `voco-llama index` against the limit, the bare passes of vision tower and language model
over the same tokens. Answering: time to the first token of an answer from the store, from pixels, and from a full
key-value cache of the same image that is read from disk. 8 bits: how many answers about the scenes change.

    python benchmarks/store.py --output benchmarks/results/store_cpu.json
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.llava import as_llava
from voco_llama_hf.scenes.still import make_scene
from voco_llama_hf.store import VoCoStore, hash_file
from voco_llama_hf.store.indexing import Indexer, Sampling, find_files
from voco_llama_hf.store.shards import dequantize, quantize


K, BATCH = 2, 16


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def alternate(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Medians of variants that take turns; the first turn warms up."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in track(range(rounds + 1), description="Alternating"):
        for name, work in variants.items():
            duration = seconds(work)
            if turn > 0:
                times[name].append(duration)
    return {name: statistics.median(values) for name, values in times.items()}


def bare_passes(model: Any, pixels: torch.Tensor) -> Callable[[], None]:
    """Vision tower, projector and one causal pass over as many tokens as a segment has."""
    config = model.config
    extra = len(config.vision_prefix_token_ids) + len(config.vision_suffix_token_ids) + K

    @torch.no_grad()
    def work() -> None:
        for batch in pixels.split(BATCH):
            vision = model.model.get_vision_features(batch.to(model.device))
            padding = vision.new_zeros(len(batch), extra, vision.shape[-1])
            model.model.language_model(inputs_embeds=torch.cat([vision, padding], dim=1), use_cache=False)

    return work


def indexing(model: Any, processor: Any, folder: Path, rounds: int) -> dict[str, float]:
    files = find_files(folder)
    pictures = [Image.open(path) for path in files]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.dtype)
    stores = (Path(tempfile.mkdtemp()) / "store" for _ in range(rounds + 1))

    def index() -> None:
        indexer = Indexer(next(stores), model, processor, K, Sampling(num_frames=1), batch_size=BATCH)
        for _ in indexer.run(indexer.select(files)):
            pass

    medians = alternate({"limit": bare_passes(model, pixels), "index": index}, rounds)
    return {name: len(files) / median for name, median in medians.items()}


@torch.no_grad()
def answering(model: Any, processor: Any, folder: Path, question: str, rounds: int) -> dict[str, float]:
    """Seconds to the first token of an answer about one image."""
    path = find_files(folder)[0]
    place = Path(tempfile.mkdtemp())
    indexer = Indexer(place / "store", model, processor, K, Sampling(num_frames=1))
    list(indexer.run(indexer.select([path])))
    address = hash_file(path)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
        add_generation_prompt=True,
    )

    # The full cache of what a LLaVA prefills for the image: prefix and vision tokens
    pixels = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"].to(model.dtype)
    prefix = model.model._embed_ids(model.config.vision_prefix_token_ids)[None]
    embeds = torch.cat([prefix, model.model.get_vision_features(pixels.to(model.device)).to(prefix)], dim=1)
    past = model.model.language_model(inputs_embeds=embeds, use_cache=True).past_key_values
    full = {f"keys{i}": layer.keys.cpu() for i, layer in enumerate(past.layers)}
    full |= {f"values{i}": layer.values.cpu() for i, layer in enumerate(past.layers)}
    save_file(full, place / "full.safetensors")
    llava = as_llava(model)
    seen = [
        *model.config.vision_prefix_token_ids,
        *[model.config.image_token_id] * (embeds.shape[1] - prefix.shape[1]),
    ]

    def from_store() -> None:
        with VoCoStore(place / "store") as store:
            cache = store.get(address).to(model.device)
        inputs = processor(text=text, voco_cache=cache, return_tensors="pt").to(model.device)
        model.generate(**inputs, voco_cache=cache, max_new_tokens=1, do_sample=False)

    def from_pixels() -> None:
        inputs = processor(images=Image.open(path), text=text, num_voco_tokens=K, return_tensors="pt").to(model.device)
        model.generate(**inputs, max_new_tokens=1, do_sample=False)

    def from_full_cache() -> None:
        loaded, cache = load_file(place / "full.safetensors", device=str(model.device)), DynamicCache()
        for i in range(len(past.layers)):
            cache.update(loaded[f"keys{i}"], loaded[f"values{i}"], i)
        tail = processor.tokenizer(text.split("<image>")[1], add_special_tokens=False).input_ids
        ids = torch.tensor([[*seen, *tail]], device=model.device)
        mask = torch.ones_like(ids)
        llava.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1, do_sample=False)

    variants = {"pixels": from_pixels, "full cache from disk": from_full_cache, "store": from_store}
    medians = alternate(variants, rounds)
    store_bytes = VoCoStore(place / "store").get(address).nbytes
    sizes = {"full_bytes": sum(tensor.nbytes for tensor in full.values()), "store_bytes": store_bytes}
    return {**medians, **sizes}


def eight_bits(model: Any, processor: Any, num_scenes: int) -> dict[str, float]:
    """Answers about scenes from caches as computed and in 8 bits: how many are right, how many change."""
    number = right = right_8bit = changed = 0
    for index in track(range(num_scenes), description="Asking"):
        scene: dict[str, Any] = make_scene("test", index)
        pairs = list(zip(scene["questions"], scene["answers"]))
        pixels = processor.image_processor(scene["image"], return_tensors="pt")["pixel_values"]
        cache = model.compress(pixels.to(model.dtype), K)
        rounded = type(cache)(
            *(dequantize(*quantize(states), states.dtype) for states in (cache.keys, cache.values)),
            cache.token_counts,
            cache.fingerprint,
        )
        answers = []
        for compressed in (cache, rounded):
            repeated = type(cache).cat([compressed] * len(pairs))
            texts = [f"<image>\n{question}\n" for question, _ in pairs]
            inputs = processor(text=texts, voco_cache=repeated, padding=True, padding_side="left", return_tensors="pt")
            ids = model.generate(**inputs, voco_cache=repeated, max_new_tokens=6, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers.append([text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)])
        number += len(pairs)
        right += sum(answer == expected for answer, (_, expected) in zip(answers[0], pairs))
        right_8bit += sum(answer == expected for answer, (_, expected) in zip(answers[1], pairs))
        changed += sum(first != second for first, second in zip(*answers))
    return {"questions": number, "right": right, "right_8bit": right_8bit, "changed": changed}


def render_scene(index: int) -> Image.Image:
    scene: dict[str, Any] = make_scene("test", index)
    return scene["image"]


def main(
    model: str = EMBEDDED_CHECKPOINT,
    images: Annotated[int, typer.Option(help="Images to index.")] = 128,
    scenes: Annotated[int, typer.Option(help="Scenes to ask about in 8 bits.")] = 40,
    rounds: int = 5,
    device: str = "cpu",
    dtype: str = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
) -> None:
    """Measure indexing, answering and 8-bit storage."""
    network: Any = VoCoLlamaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()
    processor = VoCoLlamaProcessor.from_pretrained(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(images):
            render_scene(i).save(folder / f"{i}.png")
        rates = indexing(network, processor, folder, rounds)
        times = answering(network, processor, folder, "What colour is the circle?", 3 * rounds)
    answers = eight_bits(network, processor, scenes)

    table = Table(title=f"{Path(model).name} on {device}, {dtype}, k = {K}")
    for heading in ("", "measured", "ratio"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("indexing, limit", f"{rates['limit']:.1f} images/s", "1.00")
    table.add_row("indexing", f"{rates['index']:.1f} images/s", f"{rates['index'] / rates['limit']:.2f}")
    for source in ("pixels", "full cache from disk", "store"):
        ratio = times[source] / times["pixels"]
        table.add_row(f"first token from {source}", f"{1e3 * times[source]:.1f} ms", f"{ratio:.2f}")
    table.add_row("bytes, full cache", f"{times['full_bytes']:,}", "1.00")
    table.add_row("bytes, store", f"{times['store_bytes']:,}", f"{times['store_bytes'] / times['full_bytes']:.4f}")
    table.add_row("8 bits: answers changed", f"{answers['changed']} of {answers['questions']}", "")
    table.add_row("right, as computed and in 8 bits", f"{answers['right']} and {answers['right_8bit']}", "")
    Console(width=120).print(table)
    if output is not None:
        hardware = (
            torch.cuda.get_device_name()
            if device.startswith("cuda")
            else f"{platform.machine()}, {os.cpu_count()} cores"
        )
        record = {
            "date": date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "hardware": hardware,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "threads": torch.get_num_threads(),
            "dtype": dtype,
            "num_voco_tokens": K,
            "images_per_second": rates,
            "seconds_to_first_token": times,
            "eight_bits": answers,
        }
        output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
