"""Options that several commands share, and checks of what is given for them."""

import os
import re
from collections.abc import Iterable, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .errors import UsageProblem


PLOT_FORMATS = (".pdf", ".png", ".svg")


class Dtype(StrEnum):
    """Data types a model can run in or be stored in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Model folder or Hub id. By default the small model that the package ships."),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps, ... By default the accelerator if there is one.")
]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Data type to run in. By default that of the checkpoint.")]
NumVoCoTokensOption = Annotated[
    int | None,
    typer.Option("--num-voco-tokens", "-k", min=1, help="VoCo tokens an image. By default the model's own number."),
]
NumVoCoTokensPerTileOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="VoCo tokens of every tile of an image, each compressed on its own, instead of --num-voco-tokens: of a "
        "model that divides images into tiles.",
    ),
]
NumFramesOption = Annotated[
    int | None, typer.Option(min=1, help="Frames of a video, evenly spaced. By default the model's own number.")
]
FpsOption = Annotated[float | None, typer.Option(help="Frames of a video, a second, instead of --num-frames.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]


def parse_numbers(text: str, option: str) -> list[int]:
    """Integers separated by commas or spaces; an empty text is an empty list."""
    try:
        return [int(number) for number in re.split(r"[,\s]+", text.strip()) if number]
    except ValueError:
        raise UsageProblem(f"{option} takes numbers like 1,2,4, got {text!r}") from None


def join_numbers(args: Sequence[str], options: Sequence[str]) -> list[str]:
    """Turns `--option 1 2 4` into `--option 1,2,4`, which click can parse."""
    joined: list[str] = []
    for arg in args:
        if arg.isdecimal() and len(joined) > 1 and joined[-2] in options:
            joined[-1] = f"{joined[-1]},{arg}"
        else:
            joined.append(arg)
    return joined


def check_numbers(num_voco_tokens: int | None, num_voco_tokens_per_tile: int | None) -> None:
    """
    Raises:
        UsageProblem: if both are given.
    """
    if num_voco_tokens is not None and num_voco_tokens_per_tile is not None:
        raise UsageProblem("give --num-voco-tokens or --num-voco-tokens-per-tile, not both")


def check_extra(command: str, extra: str, modules: Sequence[str]) -> None:
    """
    Raises:
        UsageProblem: if one of the `modules` of an extra is not installed.
    """
    if any(find_spec(module) is None for module in modules):
        raise UsageProblem(f"{command} needs the extra {extra}: pip install 'voco-llama-hf[{extra}]'")


def check_sampling_options(num_frames: int | None, fps: float | None) -> None:
    """
    Raises:
        UsageProblem: if both are given, or `fps` is not above 0.
    """
    if num_frames is not None and fps is not None:
        raise UsageProblem("give --num-frames or --fps, not both")
    if fps is not None and not fps > 0:
        raise UsageProblem(f"--fps must be above 0, got {fps}")


def check_train_extra(command: str, modules: Sequence[str]) -> None:
    """
    Raises:
        UsageProblem: if one of the `modules` of the extra `train` is not installed.
    """
    check_extra(command, "train", modules)


def check_video_extra(paths: Iterable[str]) -> None:
    """
    Raises:
        UsageProblem: if there is a video among the `paths`, and no decoder installed.
    """
    from voco_llama_hf.videos import is_video

    if any(map(is_video, paths)):
        check_extra("a video", "video", ["av"])


def check_output(path: Path, force: bool, inputs: Sequence[str] = ()) -> None:
    """
    Raises:
        UsageProblem: if `path` cannot be written to, exists without `force`, or is one of the `inputs`.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UsageProblem(f"{folder} is not a folder: {path.name} cannot be written there")
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        kind = "a folder" if path.is_dir() else "a link" if path.is_symlink() else "a device, a pipe or a socket"
        raise UsageProblem(f"{path} is {kind}: name the file to write")
    if any(os.path.exists(name) and path.exists() and os.path.samefile(name, path) for name in inputs):
        raise UsageProblem(f"{path} is one of the inputs: give another name for the output")
    if path.exists() and not force:
        raise UsageProblem(f"{path} exists: give another name, or --force to replace it")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageProblem(f"{path} cannot be written: permission denied")


def check_plot(path: Path | None) -> None:
    """
    Raises:
        UsageProblem: if a picture is asked for in a format that cannot be drawn.
    """
    if path is not None and path.suffix.lower() not in PLOT_FORMATS:
        raise UsageProblem(f"{path} can be drawn as {', '.join(PLOT_FORMATS)} only")


def plural(number: int, one: str, many: str | None = None) -> str:
    """`1 image`, `2 images`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def human_bytes(number: float) -> str:
    """1500 -> `1.5 kB`, in the decimal units the paper uses."""
    for unit in ("B", "kB", "MB"):
        if number < 999.95:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
