"""What visitors may start with, if the embedded checkpoint answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import EMBEDDED_CHECKPOINT
from ..hub.card import scaled
from .engine import DemoEngine


FOLDER = Path(__file__).parent / "examples"


@dataclass(frozen=True)
class Example:
    """
    Args:
        label (`str`): What it is called.
        path (`Path`): An image or a video.
        icon (`Path`): An image of it.
        questions (`tuple[str, ...]`): What may be asked about it.
    """

    label: str
    path: Path
    icon: Path
    questions: tuple[str, ...]


EMBEDDED_EXAMPLES = (
    Example(
        "A few objects",
        FOLDER / "few.png",
        FOLDER / "few.png",
        (
            "What colour is the circle?",
            "Where is the orange circle?",
            "What digit is yellow?",
            "Is the green star left of the orange circle?",
        ),
    ),
    Example(
        "A crowded scene",
        FOLDER / "crowded.png",
        FOLDER / "crowded.png",
        # One token confuses some of it, two do not
        (
            "What colour is the cross?",
            "What shape is red?",
            "How many objects are there?",
            "Where is the purple object?",
        ),
    ),
    Example(
        "A short video",
        FOLDER / "film.mp4",
        FOLDER / "film.png",
        (
            "Does the white star move left or right?",
            "Does the white star speed up or slow down?",
            "Which comes first, the red triangle or the green circle?",
            "What shape is blue?",
        ),
    ),
)

# About any picture
QUESTIONS = ("How many objects are there?", "What shape is red?", "What colour is the circle?", "Where is the star?")

ABOUT_EMBEDDED = (
    "The model on this page is tiny: {parameters} parameters. It was trained on **pictures of 64&times;64 pixels with "
    "coloured shapes and handwritten digits**, on videos of eight such pictures, and knows nothing else. Ask it for "
    "colour, shape, digit, place and number, which way something moves and what comes first; about a photograph, or "
    "in other words, it makes answers up."
)
ABOUT_OTHERS = (
    "The model on this page is **{name}**: {parameters} parameters, {vision_tokens} vision tokens a picture."
)


def introduce(engine: DemoEngine, name: str) -> tuple[str, Sequence[Example], Sequence[str]]:
    """
    What a page says of the model with this folder or Hub id.

    Returns:
        What it knows, in Markdown; what can be taken instead of dropping something; what to ask about anything else.
    """
    is_embedded = Path(name).exists() and Path(name).samefile(EMBEDDED_CHECKPOINT)
    about = (ABOUT_EMBEDDED if is_embedded else ABOUT_OTHERS).format(
        name=Path(name).resolve().name if Path(name).is_dir() else name,
        parameters=scaled(engine.cost.num_parameters, ("", "thousand", "million", "billion")),
        vision_tokens=engine.num_vision_tokens,
    )
    return (about, EMBEDDED_EXAMPLES, QUESTIONS) if is_embedded else (about, (), ())


__all__ = ["EMBEDDED_EXAMPLES", "QUESTIONS", "Example", "introduce"]
