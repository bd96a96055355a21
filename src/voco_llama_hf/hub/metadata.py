"""What the Hub takes as a licence and as a base model, checked before a card is written."""

from difflib import get_close_matches
from pathlib import Path

from ..loading import is_hub_id


LICENSES = frozenset(Path(__file__).with_name("licenses.txt").read_text().split())
LICENSES_URL = "https://huggingface.co/docs/hub/repositories-licenses"


def check_license(name: str) -> None:
    """
    Raises:
        ValueError: if it is none of the Hub's identifiers.
    """
    if name in LICENSES:
        return
    close = get_close_matches(name.lower(), LICENSES, n=1)
    hint = f"did you mean {close[0]}?" if close else f"take one of {LICENSES_URL}, or other"
    raise ValueError(f"the Hub knows no licence {name!r}: {hint}")


def check_base_model(name: str) -> None:
    """
    Raises:
        ValueError: if it cannot be the id of a model on the Hub.
    """
    if not is_hub_id(name):
        raise ValueError(f"a base model is named by its id on the Hub, as in llava-hf/llava-1.5-7b-hf, got {name!r}")


__all__ = ["check_base_model", "check_license"]
