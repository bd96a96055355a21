"""What the card of a checkpoint that reads the scenes says."""

from __future__ import annotations

from typing import TypedDict

from .building import PATCH_SIZE
from .recipe import Recipe
from .video_evaluation import TEMPORAL, VideoResults, chance


DESCRIPTION = """\
A model of {millions:.1f} million parameters, trained from {origin} on procedural scenes: coloured shapes and
handwritten digits on a canvas of {side}x{side} pixels{videos}. It answers short questions about colour, shape, digit,
place, number, existence and comparison of the objects{happenings}. It reads k VoCo tokens an image{frames}, or all
{num_vision_tokens} vision tokens. It knows nothing else."""
ABOUT_VIDEOS = {
    "videos": ", then on short videos of them",
    "happenings": ", and about what happens in a video: which way something moves, whether it speeds up, what comes "
    "or is hidden first",
    "frames": " or frame",
}

RESULTS = """\
Exact match in percent on the test split ({num_scenes} scenes, {num_questions} questions, each asked on its own).
Sparse scenes have {sparse} objects, dense ones {dense}. *Shuffled* asks every question about the image of another
scene of the same difficulty: what can be guessed without seeing. *Retention* is the share of what seeing adds that the
VoCo tokens keep, (exact match - shuffled) / (uncompressed - shuffled).

By family of questions: `results.json`, `results.png`. A family whose score is near its shuffled one is not learned.

![exact match by family](results.png)"""

VIDEO_RESULTS = """\
The {num_clips} videos of 8 frames are asked about with all frames, with one of them drawn at random, and with all of
them out of order. *Temporal* are the questions that nobody can answer without the order; guessing gets {chance:.0f} %.

![exact match on videos by family](videos.png)"""

TRAINING = """\
`{command}` reproduces it: `voco_llama_hf.scenes` draws the scenes, {beginning}, teaches the
vision tower to name what lies on each patch, and then trains the model: first on uncompressed images, then under the
VoCo mask with the number of VoCo tokens drawn anew for every step, and a share of uncompressed steps. In the end every
question sees the VoCo tokens and itself only, so that no answer can be copied from another.{videos} The handwritten
digits are those of scikit-learn's `load_digits`; the splits share none.

![loss and accuracy over the steps](training.png)"""
VIDEO_TRAINING = """\
 The last phase, the second one of the paper, mixes short videos in, the vision tower frozen: the frames of a batch are
compressed together, and their VoCo tokens stand one behind the other. Of the weights it ends with {share:.0f} % are
taken, and the rest of those that it started from (weight averaging): that restores what it had cost on images."""

LIMITS = """\
- It knows the scenes and nothing else: photographs, text and questions in other words are beyond it.
- It was trained on single images{frames}: answers about {others} are guesses."""


class CardTexts(TypedDict):
    """Arguments of [`make_card`] that say more than every card does."""

    name: str
    license: str
    language: str
    description: str
    results_text: str
    training_text: str
    limits: str


def model_card(summary: dict, recipe: Recipe, name: str) -> CardTexts:
    """
    What the card of a checkpoint says.

    Args:
        summary (`dict`): What `results.json` holds.
        recipe ([`Recipe`]): How it was trained.
        name (`str`): What it is called.
    """
    test, canvas, last = summary["test"], recipe.canvas, recipe.phases[-1]
    num_questions = sum(counts["all"] for counts in test["num_questions"].values())
    ranges = {name: f"{low} to {high}" for name, (low, high) in canvas.difficulties.items()}
    results_text = RESULTS.format(num_scenes=test["num_scenes"], num_questions=num_questions, **ranges)
    if "videos" in summary:
        videos = VideoResults(**summary["videos"])
        results_text += "\n\n" + VIDEO_RESULTS.format(
            num_clips=videos.num_clips, chance=100 * chance(videos)[TEMPORAL]
        )
    is_new = recipe.start is None
    return {
        "name": name,
        "license": "apache-2.0",
        "language": "en",
        "description": DESCRIPTION.format(
            millions=summary["num_parameters"] / 1e6,
            origin="random weights" if is_new else "those of `voco-scenes-tiny`",
            side=canvas.side,
            num_vision_tokens=(canvas.side // PATCH_SIZE) ** 2,
            **{name: text if last.videos else "" for name, text in ABOUT_VIDEOS.items()},
        ),
        "results_text": results_text,
        "training_text": TRAINING.format(
            command="make train-tiny" if is_new else "make train-576",
            beginning="trains the tokenizer" if is_new else "starts from `voco-scenes-tiny`",
            videos=VIDEO_TRAINING.format(share=100 * last.share) if last.videos else "",
        ),
        "limits": LIMITS.format(
            frames=" and on videos of eight frames" if last.videos else "",
            others="several images, or about much longer videos," if last.videos else "several images or videos",
        ),
    }
