"""What a still scene holds, and how it is drawn: coloured shapes and handwritten digits, each in a cell of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .canvas import SMALL, Canvas


SUPERSAMPLING = 4  # shapes are drawn larger and reduced, for smooth edges

COLOURS = {
    "red": (225, 40, 45),
    "orange": (245, 135, 25),
    "yellow": (250, 225, 55),
    "green": (45, 175, 75),
    "cyan": (70, 225, 230),
    "blue": (50, 90, 240),
    "purple": (165, 70, 200),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = tuple(SMALL.sizes)

# The outlines of the polygons in a unit square, y down.
OUTLINES = {
    "square": ((0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)),
    "triangle": ((0.5, 0.02), (1.0, 0.96), (0.0, 0.96)),
    "cross": tuple(
        zip(
            (0.33, 0.67, 0.67, 1.0, 1.0, 0.67, 0.67, 0.33, 0.33, 0.0, 0.0, 0.33),
            (0.0, 0.0, 0.33, 0.33, 0.67, 0.67, 1.0, 1.0, 0.67, 0.67, 0.33, 0.33),
            strict=True,
        )
    ),
    "star": tuple(
        (0.5 + radius * np.sin(np.pi * i / 5), 0.52 - radius * np.cos(np.pi * i / 5))
        for i, radius in enumerate((0.52, 0.22) * 5)
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """
    One object of a scene.

    Args:
        colour (`str`): One of [`COLOURS`].
        name (`str`): One of [`SHAPES`], or the digit `"0"` to `"9"`.
        size (`str`): `"small"` or `"large"`.
        cell (`int`): Its cell, rows first.
        left (`int`): Left edge of the bounding box in pixels.
        top (`int`): Top edge of the bounding box in pixels.
        pixels (`int`): Side of the bounding box in pixels.
        canvas ([`Canvas`], *optional*): Where it is drawn.
    """

    colour: str
    name: str
    size: str
    cell: int
    left: int
    top: int
    pixels: int
    canvas: Canvas = SMALL

    @property
    def row(self) -> int:
        return self.cell // self.canvas.grid

    @property
    def column(self) -> int:
        return self.cell % self.canvas.grid

    @property
    def position(self) -> str:
        return self.canvas.positions[self.cell]

    @property
    def at(self) -> str:
        return self.canvas.at(self.cell)

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}"


@cache
def glyphs(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of a split: images of shape (number, 8, 8) from 0 to 16, and labels of shape (number,)."""
    images, labels = load_digits(return_X_y=True)
    parts = dict(zip(("train", "rest"), _stratified(np.arange(len(labels)), labels, 0.2), strict=True))
    parts["validation"], parts["test"] = _stratified(parts["rest"], labels[parts["rest"]], 0.5)
    return images[parts[split]].reshape(-1, 8, 8), labels[parts[split]]


def _stratified(indices: np.ndarray, labels: np.ndarray, share: float) -> list[np.ndarray]:
    return train_test_split(indices, test_size=share, stratify=labels, random_state=0)


def sample_objects(rng: np.random.Generator, difficulty: str, canvas: Canvas = SMALL) -> list[SceneObject]:
    """Draws the objects of a scene, each inside a cell of its own, ordered by cell."""
    low, high = canvas.difficulties[difficulty]
    cells = np.sort(rng.choice(canvas.grid**2, size=rng.integers(low, high + 1), replace=False))
    objects = []
    for cell in cells.tolist():
        size = str(rng.choice(SIZES))
        pixels = int(rng.integers(canvas.sizes[size][0], canvas.sizes[size][1] + 1))
        left, top = rng.integers(1, canvas.cell - pixels, size=2, endpoint=True).tolist()
        is_digit = rng.random() < 0.4
        objects.append(
            SceneObject(
                colour=str(rng.choice(list(COLOURS))),
                name=str(rng.integers(10)) if is_digit else str(rng.choice(SHAPES)),
                size=size,
                cell=cell,
                left=cell % canvas.grid * canvas.cell + left,
                top=cell // canvas.grid * canvas.cell + top,
                pixels=pixels,
                canvas=canvas,
            )
        )
    return objects


def draw_shapes(
    side: int, background: tuple[int, ...], shapes: list[tuple[str, tuple[int, ...], float, float, int]]
) -> Image.Image:
    """
    Draws a canvas with shapes on it.

    Args:
        side (`int`): Pixels of the canvas a side.
        background (`tuple[int, ...]`): Colour of the canvas.
        shapes (`list[tuple]`): Name, colour, left, top and side of each, in pixels.
    """
    canvas = Image.new("RGB", (side * SUPERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(canvas)
    for name, fill, *box in shapes:
        left, top, size = (round(number * SUPERSAMPLING) for number in box)
        if name == "circle":
            draw.ellipse((left, top, left + size - 1, top + size - 1), fill=fill)
        else:
            draw.polygon([(left + x * (size - 1), top + y * (size - 1)) for x, y in OUTLINES[name]], fill=fill)
    return canvas.reduce(SUPERSAMPLING)


def render(rng: np.random.Generator, objects: list[SceneObject], split: str, canvas: Canvas = SMALL) -> Image.Image:
    """Draws a scene as an RGB image, its digits with glyphs of `split`."""
    background = tuple(rng.integers(0, 50, size=3).tolist())
    noise = rng.integers(-12, 13, size=(len(objects), 3))
    colours = np.array([COLOURS[o.colour] for o in objects])
    fills = list(map(tuple, (colours + noise).clip(0, 255).tolist()))
    shapes = [(o.name, fill, o.left, o.top, o.pixels) for o, fill in zip(objects, fills, strict=True)]
    image = draw_shapes(canvas.side, background, [shape for shape in shapes if shape[0] in SHAPES])
    images, labels = glyphs(split)
    for obj, fill in zip(objects, fills, strict=True):
        if obj.name.isdigit():
            glyph = images[rng.choice(np.flatnonzero(labels == int(obj.name)))]
            stroke = Image.fromarray((glyph * 255 / 16).astype(np.uint8))
            stroke = stroke.resize((obj.pixels,) * 2, Image.Resampling.BICUBIC).rotate(
                rng.uniform(-8, 8), Image.Resampling.BICUBIC
            )
            image.paste(fill, (obj.left, obj.top), stroke)
    return image
