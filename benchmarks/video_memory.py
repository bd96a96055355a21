"""Peak memory of compressing a long video, streamed from its file: it grows by the VoCo tokens of a frame and no more.

Every number of frames runs in a process of its own, with a random model around a CLIP tower at 336 pixels.

    python benchmarks/video_memory.py --frames 100 500 2000
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Annotated

import av
import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from voco_llama_cli.options import join_numbers
from voco_llama_hf import VoCoLlamaConfig, VoCoLlamaForConditionalGeneration
from voco_llama_hf.videos import read_frames


IMAGE_SIZE = 336


def build(text_layers: int) -> VoCoLlamaForConditionalGeneration:
    """The language model of the embedded checkpoint, 6 layers, behind a small CLIP tower of 576 tokens."""
    config = VoCoLlamaConfig(
        text_config=LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=text_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=512,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=14,
        ),
        voco_token_id=127,
    )
    return VoCoLlamaForConditionalGeneration(config).eval()


def write_video(path: Path, num_frames: int) -> None:
    """A square that wanders."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = IMAGE_SIZE
        stream.pix_fmt = "yuv420p"
        for i in range(num_frames):
            frame = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
            frame[i % 300 : i % 300 + 36, 100:136] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def resident(name: str) -> int:
    """A size of this process in bytes: `VmRSS` now, `VmHWM` its peak."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def measure(path: Path, num_voco_tokens: int, batch_size: int, text_layers: int) -> dict[str, float]:
    """Peak above what is held before the video is opened, its first frames being compressed already."""
    model, processor = (
        build(text_layers),
        CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE),
    )

    def batches(frames):
        held = []
        for frame in frames:
            held.append(frame)
            if len(held) == batch_size:
                yield processor(held, return_tensors="pt")["pixel_values"]
                held = []
        if held:
            yield processor(held, return_tensors="pt")["pixel_values"]

    model.compress(batches(read_frames(path, num_frames=batch_size)), num_voco_tokens, batch_size, show_progress=False)
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak of the resident set
    held = resident("VmRSS")
    cache = model.compress(batches(read_frames(path)), num_voco_tokens, batch_size, show_progress=False)
    return {
        "frames": len(cache),
        "peak_bytes": resident("VmHWM") - held,
        "cache_bytes": cache.nbytes,
        "pixel_bytes": len(cache) * 3 * IMAGE_SIZE**2 * 4,
    }


def main(
    frames: Annotated[str, typer.Option(help="Numbers of frames to compare.")] = "100,500,2000",
    num_voco_tokens: int = 2,
    batch_size: int = 16,
    text_layers: int = 6,
    output: Annotated[Path | None, typer.Option(help="JSON file to write the figures to.")] = None,
    measure_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure peak memory by the number of frames."""
    torch.manual_seed(0)
    if measure_file is not None:
        print(json.dumps(measure(measure_file, num_voco_tokens, batch_size, text_layers)))
        return
    options = {"num_voco_tokens": num_voco_tokens, "batch_size": batch_size, "text_layers": text_layers}
    flags = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        # What is freed goes back to the system at once: the C library would keep some, for sizes it has seen
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        for number in map(int, frames.split(",")):
            path = Path(folder) / f"{number}.mp4"
            write_video(path, number)
            command = [sys.executable, __file__, "--measure-file", str(path), *flags]
            calls.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        for call in track(calls, description="Compressing"):
            printed, _ = call.communicate()
            rows.append(json.loads(printed.splitlines()[-1]))
            if output is not None:
                write(output, options, rows)
    report(rows, options)


def report(rows: list[dict[str, float]], options: dict[str, int]) -> None:
    """Prints peaks, and how they compare with that of the shortest video."""
    table = Table(title=f"A video of {IMAGE_SIZE} px, {options['batch_size']} frames at a time")
    for heading in ("frames", "peak MB", "of it VoCo tokens MB", "all pixels MB", "peak / first"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["frames"]),
            f"{row['peak_bytes'] / 1e6:.1f}",
            f"{row['cache_bytes'] / 1e6:.1f}",
            f"{row['pixel_bytes'] / 1e6:.0f}",
            f"{row['peak_bytes'] / rows[0]['peak_bytes']:.2f}",
        )
    Console(width=120).print(table)


def write(output: Path, options: dict[str, int], rows: list[dict[str, float]]) -> None:
    record = {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{platform.machine()}, CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "av": av.__version__},
        **options,
        "rows": rows,
    }
    output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.argv[1:] = join_numbers(sys.argv[1:], ["--frames"])
    typer.run(main)
