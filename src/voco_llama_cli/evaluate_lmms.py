"""`voco-llama evaluate --suite lmms`: the tasks of lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageProblem
from .options import check_extra


if TYPE_CHECKING:
    from voco_llama_hf.integrations.lmms_eval.suite import Network

MODULES = ("lmms_eval", "matplotlib")


@dataclass(frozen=True)
class LmmsSettings:
    """What [`~voco_llama_hf.integrations.lmms_eval.suite.Settings`] holds, where lmms-eval may be missing."""

    limit: int | None
    batch_size: int
    num_frames: int | None
    include_path: Path | None


def check_lmms_options(tasks: Sequence[str], include_path: Path | None) -> None:
    """
    Raises:
        UsageProblem: if lmms-eval is not installed, there is no task, or no folder of further ones.
    """
    check_extra("--suite lmms", "lmms-eval", MODULES)
    if not tasks:
        raise UsageProblem("--suite lmms takes tasks of lmms-eval, as in gqa pope: lmms-eval tasks lists them")
    if include_path is not None and not include_path.is_dir():
        raise UsageProblem(f"no such folder of tasks: {include_path}")


def evaluate_lmms(
    tasks: Sequence[str],
    network: Network,
    bound: Network | None,
    counts: tuple[int, ...],
    asking: LmmsSettings,
    work_dir: Path,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Asks every task at every number of VoCo tokens and at the bounds."""
    from rich.console import Console

    from .evaluate import wide_console

    with Console(stderr=True).status("Reading the tasks of lmms-eval"):
        import datasets

        from voco_llama_hf.integrations.lmms_eval.suite import Settings, Suite

        datasets.disable_progress_bars()
        suite = Suite(work_dir, tasks, Settings(*astuple(asking)))
    console = wide_console()
    results = suite.run(network, counts, bound, report=console.rule)
    results.print(console)
    if output is not None:
        results.save(output)
    if plot is not None:
        results.plot(plot)
