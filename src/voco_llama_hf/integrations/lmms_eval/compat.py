"""What is mended in lmms-eval, for as long as it is needed."""

from typing import Any

import lmms_eval.evaluator
from lmms_eval.api.instance import TokenCounts, unwrap_generation_output


def keep_scores() -> None:
    """
    Lets tasks have the numbers of `loglikelihood`: lmms-eval 0.7.3 turns `(0.5, True)`, and what its cache makes of
    it, `[0.5, True]`, into text, on which every task of multiple choice fails, with any model.
    """
    if unwrap_generation_output((0.5, True)) != ((0.5, True), None):
        lmms_eval.evaluator.unwrap_generation_output = unwrap_output


def unwrap_output(output: Any) -> tuple[Any, TokenCounts | None]:
    """As lmms-eval's own, for scores too."""
    if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[0], float):
        return tuple(output), None
    return unwrap_generation_output(output)


__all__ = ["keep_scores"]
