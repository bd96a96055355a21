"""Trainings on the paper's findings, at the paper's 576 vision tokens and with its baselines.

What one run does not finish in its time the next one goes on with: trainings resume from their last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from voco_llama_cli.evaluate import DEFAULT_COUNTS, Suite, check_counts
from voco_llama_hf.scenes.canvas import SMALL
from voco_llama_hf.scenes.phases import train
from voco_llama_hf.scenes.publishing import publish
from voco_llama_hf.scenes.recipe import RECIPES, Recipe
from voco_llama_hf.scenes.retention.report import make_rows
from voco_llama_hf.scenes.retention.sizes import BASE, Size
from voco_llama_hf.scenes.retention.study import Study, make_arms, run_study
from voco_llama_hf.scenes.retention.videos import VideoStudy, run_video_study
from voco_llama_hf.scenes.still import DIFFICULTIES

from .record import Parts
from .setting import Setting, report


STEPS, SEEDS, LIMIT = 4000, 3, 1000


def run(parts: Parts, setting: Setting) -> None:
    parts.run("retention", partial(compare_images, setting))
    parts.run("576 vision tokens", partial(train_576, setting))
    parts.run("video retention", partial(compare_videos, setting))


def tiny(recipe: Recipe) -> Recipe:
    """A recipe of the same kind that takes seconds."""
    phases = [
        replace(phase, steps=1, num_voco_tokens=(1, 2, 0), questions=2, batch_size=None) for phase in recipe.phases
    ]
    return replace(
        recipe,
        canvas=SMALL,
        phases=(phases[0],) if recipe.start is None else (phases[-1],),
        num_train_scenes=8,
        num_validation_scenes=2,
        num_test_scenes=2,
        batch_size=2,
        vision_batch_size=2,
        vision_steps=1,
        vision_layers=1,
        text_layers=1,
        num_workers=0,
    )


def train_576(setting: Setting) -> dict[str, object]:
    """`python -m voco_llama_hf.scenes.tiny --recipe scenes-576`: its results on validation and test."""
    recipe = RECIPES["scenes-576"]
    recipe = setting.pick(replace(recipe, num_workers=4), tiny(recipe))
    work_dir = setting.work_dir / "scenes-576"
    work_dir.mkdir(parents=True, exist_ok=True)
    train(recipe, work_dir, compile=not setting.dry_run)
    publish(work_dir, recipe, work_dir / "voco-scenes-576")
    return json.loads((work_dir / "voco-scenes-576" / "results.json").read_text())


def compare_images(setting: Setting) -> dict[str, object]:
    """`voco-llama evaluate --suite retention`: accuracy and retention by arm."""
    counts = setting.pick(check_counts(DEFAULT_COUNTS[Suite.retention]), (1,))
    study = Study(setting.work_dir / "retention", **study_options(setting))
    results = run_study(study, make_arms(counts), seeds(setting), "test", limit(setting), report)
    return {**about(setting), "rows": {difficulty: make_rows(results, difficulty) for difficulty in DIFFICULTIES}}


def compare_videos(setting: Setting) -> dict[str, object]:
    """`voco-llama evaluate --suite video-retention`: accuracy by arm."""
    counts = setting.pick(check_counts(DEFAULT_COUNTS[Suite.video_retention]), (1,))
    study = VideoStudy(setting.work_dir / "video-retention", **study_options(setting))
    comparison = run_video_study(study, counts, seeds(setting), "test", limit(setting), report)
    path = Path(study.work_dir) / "comparison.json"
    comparison.save(path)
    return {**about(setting), **json.loads(path.read_text())}


def study_options(setting: Setting) -> dict[str, object]:
    base = setting.pick(replace(BASE, num_workers=4), tiny(BASE))
    return {"size": Size(base, setting.pick(STEPS, 1)), "compile": not setting.dry_run}


def seeds(setting: Setting) -> range:
    return range(setting.pick(SEEDS, 1))


def limit(setting: Setting) -> int:
    return setting.pick(LIMIT, 2)


def about(setting: Setting) -> dict[str, object]:
    return {"steps": setting.pick(STEPS, 1), "seeds": len(seeds(setting)), "limit": limit(setting)}
