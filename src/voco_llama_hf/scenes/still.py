"""Small procedural scenes with questions and answers: coloured shapes and handwritten digits on a canvas."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import TypedDict

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from .canvas import SMALL, Canvas
from .objects import COLOURS, SHAPES, SIZES, SceneObject, render, sample_objects


DIFFICULTIES = tuple(SMALL.difficulties)
SPLITS = ("train", "validation", "test")
DESCRIBE = "Describe the scene."

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


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    content: str


class ObjectRow(TypedDict):
    """What is told of a [`SceneObject`]."""

    colour: str
    name: str
    size: str
    cell: int
    left: int
    top: int
    pixels: int


class Scene(TypedDict):
    """A row of [`make_scenes`]."""

    image: PILImage.Image
    messages: list[Message]
    description: str
    difficulty: str
    families: list[str]
    questions: list[str]
    answers: list[str]
    objects: list[ObjectRow]


def to_row(o: SceneObject) -> ObjectRow:
    return {
        "colour": o.colour,
        "name": o.name,
        "size": o.size,
        "cell": o.cell,
        "left": o.left,
        "top": o.top,
        "pixels": o.pixels,
    }


def _unique(objects: list[SceneObject], key: str) -> Iterator[SceneObject]:
    values = list(map(attrgetter(key), objects))
    return (o for o, value in zip(objects, values, strict=True) if values.count(value) == 1)


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
    """About phrases that share a colour or a name with an object of the scene, there or not."""
    present = {o.phrase for o in objects}
    colours, names = {o.colour for o in objects}, {o.name for o in objects}
    for name in (*SHAPES, *map(str, range(10))):
        for colour in COLOURS:
            phrase = f"{colour} {name}"
            if colour in colours or name in names:
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
    Draws `number` different questions, or all that there are, as (family, question, answer).

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
    while pools and len(drawn) < number:
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


def conversation(pairs: Iterable[tuple[str, str]]) -> list[Message]:
    """Questions and answers in turn."""
    turns: list[Message] = []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def make_scene(
    split: str,
    index: int,
    seed: int = 0,
    dense_share: float = 0.5,
    questions_per_scene: int = 7,
    canvas: Canvas = SMALL,
) -> Scene:
    """Makes one row of [`make_scenes`]; it depends on the arguments alone."""
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    difficulty = "dense" if rng.random() < dense_share else "sparse"
    objects = sample_objects(rng, difficulty, canvas)
    families, questions, answers = zip(*sample_questions(rng, objects, questions_per_scene), strict=True)
    return {
        "image": render(rng, objects, split, canvas),
        "messages": conversation(zip(questions, answers, strict=True)),
        "description": describe(objects),
        "difficulty": difficulty,
        "families": list(families),
        "questions": list(questions),
        "answers": list(answers),
        "objects": [to_row(o) for o in objects],
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
