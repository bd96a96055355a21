"""Model cards, and models on the Hugging Face Hub."""

from .card import make_card, write_card
from .merge import merge_adapters
from .push import push_model
from .results import eval_result, scenes_eval_results, video_eval_results


__all__ = [
    "eval_result",
    "make_card",
    "merge_adapters",
    "push_model",
    "scenes_eval_results",
    "video_eval_results",
    "write_card",
]
