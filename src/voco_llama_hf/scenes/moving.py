"""
Short procedural videos, with questions that need the order of their frames, and some that do not.

Whatever happens could as well have happened backwards, so neither one frame nor all of them in a random order tell
more than a guess: everything that moves, comes or is hidden does so as often one way as the other, and a blinking
object is away for the same number of frames however often it blinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import TypedDict

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from .canvas import SMALL, THIRDS, Canvas
from .objects import COLOURS, SHAPES, draw_shapes
from .still import SPLITS, Message, conversation


NUM_FRAMES = 8
ABSENT_FRAMES = 3  # of a blinking object, in one to three blinks
GRID = 3  # cells a side
BOX = (128, 128, 128)
DIRECTIONS = {"horizontal": ("left", "right"), "vertical": ("up", "down")}
DESCRIBE_VIDEO = "Describe the video."
# What is said of videos and of no image, with the space in front where there is one
WORDS = (
    *("Does", "Which", "speed", "slow", "up", "down"),
    *(" does", " move", " speed", " slow", " up", " down", " comes", " first", " hidden", " gone", " times", " blink"),
)

FEATURES = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
        "description": Value("string"),
        "families": List(Value("string")),
        "questions": List(Value("string")),
        "answers": List(Value("string")),
    }
)


@dataclass(frozen=True, eq=False)
class Actor:
    """
    One object of a video.

    Args:
        colour (`str`): One of [`COLOURS`], of no other object.
        name (`str`): One of [`SHAPES`].
        pixels (`int`): Side of its bounding box.
        path (`np.ndarray` of shape `(num_frames, 2)`): Left and top of its bounding box, in pixels.
        away, covered (`tuple[int, ...]`): Frames in which it is not there, or has a box over it.
        direction, change (`str`): Of a moving object: where to, and `"speed up"` or `"slow down"`.
        blinks (`int`): How often it goes and comes back.
    """

    colour: str
    name: str
    pixels: int
    path: np.ndarray
    away: tuple[int, ...] = ()
    covered: tuple[int, ...] = ()
    direction: str = ""
    change: str = ""
    blinks: int = 0

    @property
    def phrase(self) -> str:
        return f"{self.colour} {self.name}"


@dataclass(frozen=True)
class Clip:
    """
    What happens in a video.

    Args:
        actors (`list[Actor]`): All objects.
        coming, hidden (`tuple[Actor, ...]`): Two objects in the order in which they come and go, or are covered.
    """

    actors: list[Actor]
    coming: tuple[Actor, ...]
    hidden: tuple[Actor, ...]


def sample_clip(rng: np.random.Generator, canvas: Canvas = SMALL) -> Clip:
    """Draws what happens: two of motion, blinking, coming and hiding, and perhaps an object that does nothing."""
    happens = rng.choice(["motion", "blinking", "coming", "hiding"], size=2, replace=False).tolist()
    axis, lane = str(rng.choice(list(DIRECTIONS))), int(rng.integers(GRID))
    is_in_lane = np.arange(GRID**2) // GRID == lane if axis == "horizontal" else np.arange(GRID**2) % GRID == lane
    standing = _standing(rng, rng.permutation(np.flatnonzero(~is_in_lane)).tolist(), canvas)

    actors: list[Actor] = []
    coming: tuple[Actor, ...] = ()
    hidden: tuple[Actor, ...] = ()
    if "motion" in happens:
        actors.append(_moving(rng, next(standing), axis, lane, canvas))
    if "blinking" in happens:
        actors.append(_blinking(rng, next(standing)))
    if "coming" in happens:
        spans = _two_spans(rng)
        away = [tuple(i for i in range(NUM_FRAMES) if i not in span) for span in spans]
        coming = tuple(replace(next(standing), away=frames) for frames in away)
    if "hiding" in happens:
        hidden = tuple(replace(next(standing), covered=span) for span in _two_spans(rng))
    still = [next(standing)] if rng.random() < 0.5 else []
    actors += [*coming, *hidden, *still]
    return Clip([actors[i] for i in rng.permutation(len(actors))], coming, hidden)


def sample_blinking(rng: np.random.Generator, canvas: Canvas = SMALL) -> Clip:
    """Draws three to five objects that all blink."""
    standing = _standing(rng, rng.permutation(GRID**2).tolist(), canvas)
    return Clip([_blinking(rng, next(standing)) for _ in range(rng.integers(3, 5, endpoint=True))], (), ())


def _standing(rng: np.random.Generator, cells: list[int], canvas: Canvas) -> Iterator[Actor]:
    """Objects that do nothing, each in a cell of its own and of its own colour, drawn when they are asked for."""

    def actor(cell: int, colour: str) -> Actor:
        pixels, third = int(rng.integers(canvas.moving[0], canvas.moving[1] + 1)), canvas.third
        place = np.array(divmod(cell, GRID))[::-1] * third + rng.integers(1, third - pixels, 2, endpoint=True)
        return Actor(colour, str(rng.choice(SHAPES)), pixels, np.tile(place, (NUM_FRAMES, 1)))

    return map(actor, cells, rng.permutation(list(COLOURS)).tolist())


def _moving(rng: np.random.Generator, actor: Actor, axis: str, lane: int, canvas: Canvas) -> Actor:
    """Through its lane from one side to the other, ever faster or ever slower."""
    time = np.linspace(0, 1, NUM_FRAMES)
    change = str(rng.choice(["speed up", "slow down"]))
    way = time**2 if change == "speed up" else 1 - (1 - time) ** 2
    direction = int(rng.integers(2))
    along = 1 + (canvas.side - actor.pixels - 2) * (way if direction else 1 - way)
    across = np.full(NUM_FRAMES, lane * canvas.third + rng.integers(1, canvas.third - actor.pixels, endpoint=True))
    path = np.stack([along, across] if axis == "horizontal" else [across, along], axis=1)
    return replace(actor, path=path, direction=DIRECTIONS[axis][direction], change=change)


@cache
def blink_patterns(blinks: int) -> list[tuple[int, ...]]:
    """All ways to be away for [`ABSENT_FRAMES`] frames in so many blinks, the first and the last frame left out."""
    inner = range(1, NUM_FRAMES - 1)
    return [away for away in combinations(inner, ABSENT_FRAMES) if sum(i + 1 not in away for i in away) == blinks]


def _blinking(rng: np.random.Generator, actor: Actor) -> Actor:
    blinks = int(rng.integers(1, ABSENT_FRAMES, endpoint=True))
    patterns = blink_patterns(blinks)
    return replace(actor, away=patterns[rng.integers(len(patterns))], blinks=blinks)


def _two_spans(rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Two runs of two frames, one behind the other, as likely as the same backwards."""
    first, second = sorted(rng.choice(NUM_FRAMES - 2, size=2, replace=False).tolist())
    return [(first, first + 1), (second + 1, second + 2)]


def render(rng: np.random.Generator, clip: Clip, canvas: Canvas = SMALL) -> list[PILImage.Image]:
    """Draws the frames of a video in RGB."""
    background = tuple(rng.integers(0, 50, size=3).tolist())
    fills = [
        tuple((np.array(COLOURS[actor.colour]) + rng.integers(-12, 13, 3)).clip(0, 255).tolist())
        for actor in clip.actors
    ]
    frames = []
    for i in range(NUM_FRAMES):
        seen = [(actor, fill) for actor, fill in zip(clip.actors, fills, strict=True) if i not in actor.away]
        shapes = [(actor.name, fill, *actor.path[i].tolist(), actor.pixels) for actor, fill in seen]
        frame = draw_shapes(canvas.side, background, shapes)
        for actor in clip.actors:
            if i in actor.covered:
                left, top = (actor.path[i] // canvas.third * canvas.third).tolist()
                box = (left, top, left + canvas.third - 1, top + canvas.third - 1)
                ImageDraw.Draw(frame).rectangle(box, fill=BOX)
        frames.append(frame)
    return frames


def direction_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    for actor in clip.actors:
        for one, other in DIRECTIONS.values():
            if actor.direction in (one, other):
                yield f"Does the {actor.phrase} move {one} or {other}?", actor.direction


def speed_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    for actor in clip.actors:
        if actor.change:
            yield f"Does the {actor.phrase} speed up or slow down?", actor.change


def order_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    for first, second in (clip.coming, clip.coming[::-1]) if clip.coming else ():
        yield f"Which comes first, the {first.phrase} or the {second.phrase}?", clip.coming[0].phrase


def hiding_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    for first, second in (clip.hidden, clip.hidden[::-1]) if clip.hidden else ():
        yield f"Which is hidden first, the {first.phrase} or the {second.phrase}?", clip.hidden[0].phrase


def blink_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    for actor in clip.actors:
        if actor.blinks:
            yield f"How many times does the {actor.phrase} blink?", str(actor.blinks)


def still_questions(clip: Clip) -> Iterator[tuple[str, str]]:
    """About what nearly every frame shows."""
    lasting = [actor for actor in clip.actors if actor not in clip.coming]
    for actor in lasting:
        if sum(other.name == actor.name for other in clip.actors) == 1:
            yield f"What colour is the {actor.name}?", actor.colour
        yield f"What shape is {actor.colour}?", actor.name


TEMPORAL_QUESTIONS = {
    "direction": direction_questions,
    "speed": speed_questions,
    "order": order_questions,
    "hiding": hiding_questions,
    "blinks": blink_questions,
}
TEMPORAL_FAMILIES = tuple(TEMPORAL_QUESTIONS)
STILL = "still"
CHANCE = {"direction": 1 / 2, "speed": 1 / 2, "order": 1 / 2, "hiding": 1 / 2, "blinks": 1 / 3}


def describe(clip: Clip, canvas: Canvas = SMALL) -> str:
    """
    Every object frame by frame: where it is if it moves, and otherwise whether it is there, gone or hidden. In the
    order of [`COLOURS`], so that nothing has to be guessed.
    """
    actors = sorted(clip.actors, key=lambda actor: list(COLOURS).index(actor.colour))
    states = [" ".join(_state(actor, i, canvas) for i in range(NUM_FRAMES)) for actor in actors]
    return ", ".join(f"{actor.phrase} {its_states}" for actor, its_states in zip(actors, states, strict=True))


def _state(actor: Actor, frame: int, canvas: Canvas) -> str:
    if actor.direction:
        column, row = ((actor.path[frame] + actor.pixels / 2) // canvas.third).clip(max=GRID - 1).astype(int).tolist()
        is_horizontal = actor.direction in DIRECTIONS["horizontal"]
        return THIRDS[1][column] if is_horizontal else THIRDS[0][row]
    if frame in actor.away:
        return "gone"
    return "hidden" if frame in actor.covered else "there"


class ClipRow(TypedDict):
    """A row of [`make_clips`]."""

    images: list[PILImage.Image]
    messages: list[Message]
    description: str
    families: list[str]
    questions: list[str]
    answers: list[str]


def make_clip(split: str, index: int, seed: int = 0, canvas: Canvas = SMALL, blinking: float = 0.0) -> ClipRow:
    """
    Makes one row of [`make_clips`]; it depends on the arguments alone. In a share `blinking` of all rows every object
    blinks.
    """
    rng = np.random.default_rng((seed, SPLITS.index(split), index, NUM_FRAMES))
    all_blink = blinking > 0 and rng.random() < blinking
    clip = (sample_blinking if all_blink else sample_clip)(rng, canvas)
    asked, told = [], []
    for family, questions_of in (*TEMPORAL_QUESTIONS.items(), (STILL, still_questions)):
        if pairs := list(questions_of(clip)):
            asked.append((family, *pairs[rng.integers(len(pairs))]))
            told += pairs
    families, questions, answers = zip(*asked, strict=True)
    return {
        "images": render(rng, clip, canvas),
        "messages": conversation(told),
        "description": describe(clip, canvas),
        "families": list(families),
        "questions": list(questions),
        "answers": list(answers),
    }


def make_clips(
    split: str, num_clips: int, seed: int = 0, num_proc: int | None = None, canvas: Canvas = SMALL
) -> Dataset:
    """
    Makes a split of the moving scenes. The same arguments give the same bytes, whatever `num_proc`.

    Args:
        split (`str`): `"train"`, `"validation"` or `"test"`.
        num_clips (`int`): Number of rows, one video each.
        seed (`int`, *optional*, defaults to 0): Seed of the whole data set.
        num_proc (`int`, *optional*): Number of processes.
        canvas ([`Canvas`], *optional*): Where they are drawn: by default 64x64 pixels.

    Returns:
        [`~datasets.Dataset`]: columns `images` (the frames, RGB, in time order), `messages` (one conversation of
        all there is to ask, in the format TRL takes, what needs the order of the frames first), `description` (all
        that happens), `families`, `questions` and `answers` (one entry a question, one of each family).
    """
    return Dataset.from_dict({"index": range(num_clips)}).map(
        lambda index: make_clip(split, index, seed, canvas),
        input_columns="index",
        remove_columns="index",
        features=FEATURES,
        num_proc=num_proc,
        desc=f"Drawing {split} videos",
    )
