"""One small picture in every mode and format that reaches a model, and what a person sees of it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


SIZE = (24, 16)
ORIENTATION = 0x0112
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, SIZE[::-1], dtype=np.uint8)
DEEP = RNG.integers(0, 65536, SIZE[::-1], dtype=np.uint16)
ALPHA = RNG.choice(np.array([0, 0, 90, 255], dtype=np.uint8), SIZE[::-1])


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What is behind transparency is white: the formula of compositing, in floats."""
    share = alpha[..., None] / 255
    return np.rint(colours * share + 255 * (1 - share))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def indexed(transparency: int | bytes | None) -> tuple[Image.Image, np.ndarray, dict]:
    """16 colours; transparency of one of them, of each, or of none."""
    palette, indices = COLOURS.reshape(-1, 3)[:16], RNG.integers(0, 16, SIZE[::-1], dtype=np.uint8)
    image = Image.fromarray(indices, "L").copy()
    image.putpalette(palette.tobytes())
    seen, options = palette[indices].astype(float), {}
    if transparency is not None:
        options["transparency"] = transparency
        alphas = np.full(16, 255, dtype=np.uint8)
        if isinstance(transparency, int):
            alphas[transparency] = 0
        else:
            alphas[: len(transparency)] = list(transparency)
        seen = on_white(seen, alphas[indices])
    return image, seen, options


def turned(orientation: int) -> tuple[Image.Image, np.ndarray, dict]:
    """Pixels as a camera held in one of eight ways stores them."""
    back: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
        7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
        8: lambda a: a.transpose(1, 0, 2)[::-1],
    }
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return Image.fromarray(COLOURS), back[orientation](COLOURS), {"exif": exif}


def cases() -> dict[str, tuple[Image.Image | list[Image.Image], np.ndarray, str, dict]]:
    """The image, what is seen of it, its suffix, and options of `save`, by name."""
    two_colours = np.where(GREYS > 127, 255, 0).astype(np.uint8)
    found: dict[str, tuple] = {
        "1": (Image.fromarray(two_colours).convert("1"), grey(two_colours), "png", {}),
        "L": (Image.fromarray(GREYS), grey(GREYS), "png", {}),
        "LA": (Image.merge("LA", [Image.fromarray(GREYS), Image.fromarray(ALPHA)]), on_white(grey(GREYS), ALPHA)),
        "RGB": (Image.fromarray(COLOURS), COLOURS, "png", {}),
        "RGBA": (Image.fromarray(np.dstack([COLOURS, ALPHA])), on_white(COLOURS, ALPHA)),
        "I;16": (Image.fromarray(DEEP), grey(DEEP // 256)),
        "I;16 tiff": (Image.fromarray(DEEP), grey(DEEP // 256), "tiff", {}),
        "F": (Image.fromarray(GREYS.astype(np.float32)), grey(GREYS), "tiff", {}),
        "animated": ([Image.fromarray(GREYS), Image.fromarray(255 - GREYS)], grey(GREYS), "gif", {}),
    }
    key = tuple(int(value) for value in COLOURS[3, 4])
    hidden = (key == COLOURS).all(-1)
    found["RGB tRNS"] = (
        Image.fromarray(COLOURS),
        np.where(hidden[..., None], 255, COLOURS),
        "png",
        {"transparency": key},
    )
    hidden = DEEP[3, 4] == DEEP
    seen = np.where(hidden, 255, DEEP // 256)
    found["I;16 tRNS"] = (Image.fromarray(DEEP), grey(seen), "png", {"transparency": int(DEEP[3, 4])})
    found["CMYK"] = (Image.fromarray(COLOURS).convert("CMYK"), COLOURS, "tiff", {})
    for name, transparency in (("P", None), ("P tRNS", 3), ("P tRNS of each", bytes([0, 90, 255, 0]))):
        image, seen, options = indexed(transparency)
        found[name] = (image, seen, "png", options)
    for orientation in range(1, 9):
        image, seen, options = turned(orientation)
        found[f"EXIF {orientation}"] = (image, seen, "png", options)
    return {name: case if len(case) == 4 else (*case, "png", {}) for name, case in found.items()}


def write_pictures(folder: Path) -> dict[str, tuple[Path, np.ndarray]]:
    """A file of each case, and the `(height, width, 3)` colours that are seen of it."""
    written = {}
    for name, (image, seen, suffix, options) in cases().items():
        path = folder / f"{name.replace(' ', '-').replace(';', '')}.{suffix}"
        if isinstance(image, list):
            image[0].save(path, save_all=True, append_images=image[1:], **options)
        else:
            image.save(path, **options)
        written[name] = path, np.asarray(seen)
    return written
