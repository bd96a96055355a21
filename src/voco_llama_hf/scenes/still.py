"""Small procedural scenes with questions and answers: coloured shapes and handwritten digits on a canvas."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
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
DIFFICULTIES = tuple(SMALL.difficulties)
SPLITS = ("train", "validation", "test")
DESCRIBE = "Describe the scene."

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

FEATURES = Features(
    {
        "image": Image(),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "description": Value("string"),
        "difficulty": Value("string"),
        "families": List(Value("string")),
        "questions": List(Value("string")),
        "answers": List(Value("string")),
        "objects": List(
            {
                "colour": Value("string"),
                "name": Value("string"),
                "size": Value("string"),
                "cell": Value("int32"),
                "left": Value("int32"),
                "top": Value("int32"),
                "pixels": Value("int32"),
            }
        ),
    }
)


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
) -> PILImage.Image:
    """
    Draws a canvas with shapes on it.

    Args:
        side (`int`): Pixels of the canvas a side.
        background (`tuple[int, ...]`): Colour of the canvas.
        shapes (`list[tuple]`): Name, colour, left, top and side of each, in pixels.
    """
    canvas = PILImage.new("RGB", (side * SUPERSAMPLING,) * 2, background)
    draw = ImageDraw.Draw(canvas)
    for name, fill, *box in shapes:
        left, top, size = (round(number * SUPERSAMPLING) for number in box)
        if name == "circle":
            draw.ellipse((left, top, left + size - 1, top + size - 1), fill=fill)
        else:
            draw.polygon([(left + x * (size - 1), top + y * (size - 1)) for x, y in OUTLINES[name]], fill=fill)
    return canvas.reduce(SUPERSAMPLING)


def render(rng: np.random.Generator, objects: list[SceneObject], split: str, canvas: Canvas = SMALL) -> PILImage.Image:
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
            stroke = PILImage.fromarray((glyph * 255 / 16).astype(np.uint8))
            stroke = stroke.resize((obj.pixels,) * 2, PILImage.Resampling.BICUBIC).rotate(
                rng.uniform(-8, 8), PILImage.Resampling.BICUBIC
            )
            image.paste(fill, (obj.left, obj.top), stroke)
    return image


def _unique(objects: list[SceneObject], key: str) -> Iterator[SceneObject]:
    counts = Counter(getattr(o, key) for o in objects)
    return (o for o in objects if counts[getattr(o, key)] == 1)


def _plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def colour_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    for o in objects:
        yield f"What colour is at {o.at}?", o.colour
    for o in _unique(objects, "name"):
        yield f"What colour is the {o.name}?", o.colour


def shape_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    for o in objects:
        if o.name in SHAPES:
            yield f"What shape is at {o.at}?", o.name
    for o in _unique([o for o in objects if o.name in SHAPES], "colour"):
        yield f"What shape is {o.colour}?", o.name


def digit_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    digits = [o for o in objects if o.name.isdigit()]
    for o in digits:
        yield f"What digit is at {o.at}?", o.name
    for o in _unique(digits, "colour"):
        yield f"What digit is {o.colour}?", o.name


def where_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    for o in _unique(objects, "phrase"):
        yield f"Where is the {o.phrase}?", o.position
    for o in _unique(objects, "name"):
        yield f"Where is the {o.name}?", o.position
    for o in _unique(objects, "colour"):
        yield f"Where is the {o.colour} object?", o.position


def count_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    yield "How many objects are there?", str(len(objects))
    yield "How many digits are there?", str(sum(o.name.isdigit() for o in objects))
    for name in SHAPES:
        yield f"How many {_plural(name)} are there?", str(sum(o.name == name for o in objects))
    for colour in COLOURS:
        yield f"How many {colour} objects are there?", str(sum(o.colour == colour for o in objects))
    for size in SIZES:
        yield f"How many {size} objects are there?", str(sum(o.size == size for o in objects))


def existence_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    """Present phrases, and as many absent ones, which share a colour or a name with an object of the scene."""
    present = {o.phrase for o in objects}
    colours, names = {o.colour for o in objects}, {o.name for o in objects}
    for name in (*SHAPES, *map(str, range(10))):
        for colour in COLOURS:
            phrase = f"{colour} {name}"
            if phrase in present or colour in colours or name in names:
                yield f"Is there a {phrase}?", "yes" if phrase in present else "no"


def comparison_questions(objects: list[SceneObject]) -> Iterator[tuple[str, str]]:
    named = list(_unique(objects, "phrase"))
    for a in named:
        for b in named:
            if a.column != b.column:
                answer = "yes" if a.column < b.column else "no"
                yield f"Is the {a.phrase} left of the {b.phrase}?", answer
            if a.row != b.row:
                answer = "yes" if a.row < b.row else "no"
                yield f"Is the {a.phrase} above the {b.phrase}?", answer
            if a.size != b.size:
                yield f"Is the {a.phrase} larger than the {b.phrase}?", "yes" if a.size == "large" else "no"


QUESTIONS = {
    "colour": colour_questions,
    "shape": shape_questions,
    "digit": digit_questions,
    "where": where_questions,
    "count": count_questions,
    "existence": existence_questions,
    "comparison": comparison_questions,
}
FAMILIES = tuple(QUESTIONS)


def sample_questions(rng: np.random.Generator, objects: list[SceneObject], number: int) -> list[tuple[str, str, str]]:
    """
    Draws `number` different questions as (family, question, answer).

    Families take turns in a random order; within a family the answer is drawn first and then a question that has
    it, so frequent answers gain nothing.
    """
    pools = {}
    for family in rng.permutation(FAMILIES).tolist():
        by_answer = defaultdict(list)
        for question, answer in QUESTIONS[family](objects):
            by_answer[answer].append(question)
        if by_answer:
            pools[family] = by_answer
    drawn: list[tuple[str, str, str]] = []
    while len(drawn) < number:
        for family in list(pools)[: number - len(drawn)]:
            by_answer = pools[family]
            answer = str(rng.choice(sorted(by_answer)))
            drawn.append((family, by_answer[answer].pop(rng.integers(len(by_answer[answer]))), answer))
            if not by_answer[answer]:
                del by_answer[answer]
            if not by_answer:
                del pools[family]
    return drawn


def describe(objects: list[SceneObject]) -> str:
    """All objects of a scene in one sentence, rows first."""
    return ", ".join(f"{o.size} {o.phrase} {o.position}" for o in objects)


def make_scene(
    split: str,
    index: int,
    seed: int = 0,
    dense_share: float = 0.5,
    questions_per_scene: int = 7,
    canvas: Canvas = SMALL,
) -> dict[str, object]:
    """Makes one row of [`make_scenes`]; it depends on the arguments alone."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    difficulty = "dense" if rng.random() < dense_share else "sparse"
    objects = sample_objects(rng, difficulty, canvas)
    families, questions, answers = zip(*sample_questions(rng, objects, questions_per_scene), strict=True)
    turns = [
        {"role": role, "content": text}
        for pair in zip(questions, answers, strict=True)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    return {
        "image": render(rng, objects, split, canvas),
        "messages": turns,
        "description": describe(objects),
        "difficulty": difficulty,
        "families": list(families),
        "questions": list(questions),
        "answers": list(answers),
        "objects": [{name: getattr(o, name) for name in FEATURES["objects"].feature} for o in objects],
    }


def make_scenes(
    split: str,
    num_scenes: int,
    seed: int = 0,
    dense_share: float = 0.5,
    questions_per_scene: int = 7,
    num_proc: int | None = None,
    canvas: Canvas = SMALL,
) -> Dataset:
    """
    Makes a split of the scenes data set. The same arguments give the same bytes, whatever `num_proc`.

    Splits draw from disjoint random streams and from disjoint sets of handwritten digits.

    Args:
        split (`str`):
            `"train"`, `"validation"` or `"test"`.
        num_scenes (`int`):
            Number of rows, one image each.
        seed (`int`, *optional*, defaults to 0):
            Seed of the whole data set.
        dense_share (`float`, *optional*, defaults to 0.5):
            Share of dense scenes, of 5 objects and more; the others have 1 to 4.
        questions_per_scene (`int`, *optional*, defaults to 7):
            Number of questions about each image, all in one conversation.
        num_proc (`int`, *optional*):
            Number of processes.
        canvas ([`Canvas`], *optional*):
            Where they are drawn: by default 64x64 pixels.

    Returns:
        [`~datasets.Dataset`]: columns `image` (RGB), `messages` (one conversation in the format TRL takes:
        `questions_per_scene` questions and answers), `description` (all objects in one sentence), `difficulty`,
        `families`, `questions`, `answers` (one entry a question) and `objects` (what is in the picture).
    """
    options = {"seed": seed, "dense_share": dense_share, "questions_per_scene": questions_per_scene, "canvas": canvas}
    return Dataset.from_dict({"index": range(num_scenes)}).map(
        lambda index: make_scene(split, index, **options),
        input_columns="index",
        remove_columns="index",
        features=FEATURES,
        num_proc=num_proc,
        desc=f"Drawing {split} scenes",
    )
