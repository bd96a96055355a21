"""`voco-llama evaluate`: how well a checkpoint reads the scenes."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from .errors import UsageProblem
from .evaluate_lmms import LmmsSettings, check_lmms_options, evaluate_lmms
from .options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    ModelOption,
    NumFramesOption,
    check_output,
    check_plot,
    check_train_extra,
    join_numbers,
    parse_numbers,
)


if TYPE_CHECKING:
    from rich.console import Console

    from voco_llama_hf.modeling import VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
    from voco_llama_hf.scenes.retention.sizes import Size

TRAIN_EXTRA = ("datasets", "matplotlib", "sklearn")
TABLE_WIDTH, STUDY_WIDTH = 132, 200
NUMBERS_OPTIONS = ("--num-voco-tokens", "-k")


class Split(StrEnum):
    """Splits of the scenes."""

    train = "train"
    validation = "validation"
    test = "test"


class Suite(StrEnum):
    """What is measured."""

    scenes = "scenes"
    videos = "videos"
    retention = "retention"
    video_retention = "video-retention"
    distillation = "distillation"
    lmms = "lmms"


TRAINS = (Suite.retention, Suite.video_retention, Suite.distillation)
# Options that not all suites have
OPTIONS_OF = {
    ("model", "device", "dtype", "batch_size"): (Suite.scenes, Suite.videos, Suite.lmms),
    ("split",): (Suite.scenes, Suite.videos, *TRAINS),
    ("work_dir",): (*TRAINS, Suite.lmms),
    ("size", "steps", "learning_rates", "seeds"): TRAINS,
    ("include_path", "upper_bound", "num_frames"): (Suite.lmms,),
}
DEFAULT_COUNTS = {
    Suite.scenes: "1 2 4 8",
    Suite.videos: "2",
    Suite.retention: "1 2 8",
    Suite.video_retention: "1 2 8",
    Suite.distillation: "1",
    Suite.lmms: "1 2 8",
}
SCENES, BATCH_SIZE = 1000, 128
LMMS_BATCH_SIZE = 16  # its images may be large, and its answers long


class StudySize(StrEnum):
    """Sizes of the studies that train."""

    mini = "mini"
    small = "small"
    scenes_64 = "scenes-64"


class Evaluate(TyperCommand):
    """Takes `-k 1 2 4` besides `-k 1,2,4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_numbers(args, NUMBERS_OPTIONS))


def evaluate(
    context: typer.Context,
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK]...",
            help="Of lmms: tasks or groups of lmms-eval, as in pope; with the metric of the tables where it is not "
            "the task's first, as in seedbench:seed_all.",
        ),
    ] = None,
    model: ModelOption = None,
    suite: Annotated[
        Suite,
        typer.Option(
            help="scenes: how many questions about images a model answers right. videos: about short videos, with all "
            "frames, with one, and out of order. retention: what survives VoCo tokens, and other "
            "ways to shorten an image, all trained alike from one start: an hour or two on a CPU. video-retention: "
            "the same for the frames of videos, beside pooling, a Q-Former and LLaMA-VID. distillation: what a "
            "teacher adds where few answers are known, at one VoCo token. lmms: tasks of lmms-eval at "
            "each number of VoCo tokens, uncompressed, and with the images of other questions."
        ),
    ] = Suite.scenes,
    split: Annotated[Split, typer.Option(help="Split of the scenes.")] = Split.test,
    num_voco_tokens: Annotated[
        str | None,
        typer.Option(
            *NUMBERS_OPTIONS,
            metavar="K [K...]",
            help="Numbers of VoCo tokens to compare. By default 1 2 4 8, of videos 2, of both retentions "
            "and lmms 1 2 8.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Scenes or videos to ask about, by default 1000. Of lmms: questions of a task, by default all."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Questions answered at a time. By default 128, of lmms 16.")
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="Of what trains, and of lmms: folder of weights and answers; what is there is not made "
            "again. By default in runs/, as the suite."
        ),
    ] = None,
    size: Annotated[
        StudySize,
        typer.Option(
            help="Of what trains: how large everything is. mini: 16 vision tokens and up to four objects, a minute or "
            "two an arm on one CPU core. small: the same with a deeper model, two or three minutes. scenes-64: 64 "
            "vision tokens and denser scenes, hours."
        ),
    ] = StudySize.small,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Of what trains: steps that everything is trained for, by default as the size."),
    ] = None,
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(
            "--learning-rate",
            help="Of what trains: peak learning rate, by default that of the size. Given several times, every "
            "arm is trained with each, with the first seed, and takes the one that reads validation best.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of what trains: how often everything is trained.")] = 3,
    include_path: Annotated[
        Path | None, typer.Option(help="Of lmms: folder of further tasks in lmms-eval's YAML format.")
    ] = None,
    upper_bound: Annotated[
        str | None,
        typer.Option(
            help="Of lmms: model that was trained with VoCo tokens and nothing hidden. With it the bounds are those "
            "of the paper's Table 1: what it answers, and what it answers from its VoCo tokens alone."
        ),
    ] = None,
    num_frames: NumFramesOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="JSON file to write the results to; .md for the tables of what trains, and of lmms."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Picture to draw the results into (.png, .pdf, .svg). Of retention, a second one, named with "
            "_training behind, has the course of every training, and that of distillation has nothing else."
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
) -> None:
    """Measure how well a model answers questions about the scenes it was trained on, or what survives compression.

    voco-llama evaluate --num-voco-tokens 1 2 4 8 --output results.json --plot results.png

    voco-llama evaluate --suite videos --num-voco-tokens 1 2

    voco-llama evaluate --suite retention --output retention.json --plot retention.png

    voco-llama evaluate --suite video-retention --output videos.json --plot videos.png

    voco-llama evaluate --suite distillation --output distillation.json --plot distillation.png

    voco-llama evaluate --suite lmms gqa pope mme -k 1 2 8 --output lmms.json --plot lmms.png
    """
    check_options(context, suite)
    if suite is Suite.lmms:
        check_lmms_options(tasks or [], include_path)
    else:
        if tasks:
            raise UsageProblem(f"unexpected extra argument {tasks[0]!r}: tasks go with --suite lmms")
        check_train_extra("evaluate", (*TRAIN_EXTRA, "peft", "trl") if suite in TRAINS else TRAIN_EXTRA)
    counts = check_counts(DEFAULT_COUNTS[suite] if num_voco_tokens is None else num_voco_tokens)
    for path in (output, plot):
        if path is not None:
            check_output(path, force)
    if plot is not None and suite is Suite.retention:
        from voco_llama_hf.scenes.retention.report import training_picture

        check_output(training_picture(plot), force)
    check_plot(plot)
    folder = work_dir or Path("runs") / suite.value
    if suite not in TRAINS:
        from .loading import check_reads_images_whole, find_model, load_model

        network = load_model(find_model(model), device, dtype)
        if num_voco_tokens is None and suite is not Suite.videos:
            check_reads_images_whole(network[1])
        if suite is Suite.lmms:
            bound = None if upper_bound is None else load_model(find_model(upper_bound), device, dtype)
            asking = LmmsSettings(limit, batch_size or LMMS_BATCH_SIZE, num_frames, include_path)
            evaluate_lmms(tasks or [], network, bound, counts, asking, folder, output, plot)
        else:
            batch_size = batch_size or BATCH_SIZE
            evaluate_model(suite, network, split.value, counts, limit or SCENES, batch_size, output, plot)
    else:
        limit = limit or SCENES
        trained = chosen_size(size, steps, learning_rates)
        if suite is Suite.distillation:
            if counts != (1,):
                raise UsageProblem("--suite distillation compresses into one token: --num-voco-tokens is 1")
            compare_distillation(folder, trained, seeds, split.value, limit, output, plot)
        elif suite is Suite.video_retention:
            compare_video_compressors(folder, trained, seeds, split.value, counts, limit, output, plot)
        else:
            compare_compressors(folder, size.value, trained, seeds, split.value, counts, limit, output, plot)


def check_options(context: typer.Context, suite: Suite) -> None:
    """
    Raises:
        UsageProblem: if an option is given that only other suites have.
    """
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    sources = {name: context.get_parameter_source(name) for name in names}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    for options, suites in OPTIONS_OF.items():
        refused = [names[option] for option in options if option in given]
        if refused and suite not in suites:
            *others, last = suites
            those = f"{', '.join(others)} and {last}" if others else last
            raise UsageProblem(f"{refused[0]} goes with --suite {those}, not with {suite}")


def check_counts(text: str) -> tuple[int, ...]:
    """
    Raises:
        UsageProblem: if `text` names no numbers of VoCo tokens, or some that are too small or too large.
    """
    from voco_llama_hf.modeling.processing_voco_llama import MAX_VOCO_TOKENS

    counts = tuple(parse_numbers(text, "--num-voco-tokens"))
    if not counts or min(counts) < 1:
        raise UsageProblem("--num-voco-tokens takes numbers from 1 on")
    if max(counts) > MAX_VOCO_TOKENS:
        raise UsageProblem(f"--num-voco-tokens can be at most {MAX_VOCO_TOKENS}, got {max(counts)}")
    return counts


def wide_console(width: int = TABLE_WIDTH) -> Console:
    """A console that cuts no numbers off, in a pipe too."""
    from rich.console import Console

    return Console(width=max(Console().width, width))


def evaluate_model(
    suite: Suite,
    network: tuple[VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor],
    split: str,
    counts: tuple[int, ...],
    limit: int,
    batch_size: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Asks one model."""
    import datasets

    from voco_llama_hf.scenes import evaluate_scenes, evaluate_videos
    from voco_llama_hf.scenes.scoring import Results

    datasets.disable_progress_bars()
    console = wide_console()
    results: Results = (evaluate_scenes if suite is Suite.scenes else evaluate_videos)(
        *network,
        split,
        num_voco_tokens=counts,
        batch_size=batch_size,
        limit=limit,
        progress=console.is_terminal,
    )
    results.print(console)
    if output is not None:
        results.save(output)
    if plot is not None:
        results.plot(plot)


def chosen_size(size: StudySize, steps: int | None, learning_rates: list[float] | None) -> Size:
    """
    A size, perhaps with other steps and learning rates.

    Raises:
        UsageProblem: if a learning rate is not above 0.
    """
    from voco_llama_hf.scenes.retention.sizes import SIZES

    default = SIZES[size.value]
    rates = tuple(learning_rates or default.learning_rates)
    if min(rates) <= 0 or not all(map(isfinite, rates)):
        raise UsageProblem(f"--learning-rate must be a finite number above 0, got {' '.join(map(str, rates))}")
    return replace(default, steps=default.steps if steps is None else steps, learning_rates=rates)


def compare_compressors(
    work_dir: Path,
    name: str,
    size: Size,
    seeds: int,
    split: str,
    counts: tuple[int, ...],
    limit: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Trains and asks everything of the retention suite."""
    import datasets

    from voco_llama_hf.scenes.retention.report import Comparison
    from voco_llama_hf.scenes.retention.study import Study, make_arms, run_study, trace

    datasets.disable_progress_bars()
    console = wide_console(STUDY_WIDTH)
    study = Study(work_dir, size)
    arms = make_arms(tuple(sorted(set(counts))))
    results = run_study(study, arms, range(seeds), split, limit, report=console.rule)
    courses = trace(study, arms, range(seeds))
    comparison = Comparison(name, size.steps, split, limit, results, courses)
    comparison.print(console)
    if output is not None:
        comparison.save(output)
    if plot is not None:
        comparison.plot(plot)


def compare_video_compressors(
    work_dir: Path,
    size: Size,
    seeds: int,
    split: str,
    counts: tuple[int, ...],
    limit: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Trains and asks everything of the video-retention suite."""
    import datasets

    from voco_llama_hf.scenes.retention.videos import VideoStudy, run_video_study

    datasets.disable_progress_bars()
    console = wide_console()
    study = VideoStudy(work_dir, size)
    comparison = run_video_study(study, sorted(set(counts)), range(seeds), split, limit, report=console.rule)
    console.print(comparison.table())
    if output is not None:
        comparison.save(output)
    if plot is not None:
        comparison.plot(plot)


def compare_distillation(
    work_dir: Path,
    size: Size,
    seeds: int,
    split: str,
    limit: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Trains and asks everything of the distillation suite."""
    import datasets

    from voco_llama_hf.scenes.retention.distilling import DistillationStudy, run_distillation

    datasets.disable_progress_bars()
    console = wide_console()
    study = DistillationStudy(work_dir, size)
    results = run_distillation(study, range(seeds), split, limit, report=console.rule)
    results.print(console)
    if output is not None:
        results.save(output)
    if plot is not None:
        results.plot(plot)
