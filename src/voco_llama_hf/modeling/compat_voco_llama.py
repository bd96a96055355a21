"""
Which versions of transformers this code runs on, and what differs between them.

Every file that may be the first to be loaded imports this one before anything else. It imports nothing that the oldest
transformers lacks, so that what a user reads is the version that is needed.
"""

import transformers
from transformers.utils import logging


OLDEST = (5, 19)
NEWEST_TESTED = (5, 24)

logger = logging.get_logger(__name__)


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as `"5.24.0"` or `"5.25.0.dev0"`."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


VERSION = release(transformers.__version__)

if VERSION < OLDEST:
    raise ImportError(
        f"VoCo-LLaMA's code needs transformers >= {OLDEST[0]}.{OLDEST[1]}, found {transformers.__version__}: "
        "pip install --upgrade transformers"
    )
if VERSION > NEWEST_TESTED:
    logger.warning_once(
        f"VoCo-LLaMA was tested with transformers up to {NEWEST_TESTED[0]}.{NEWEST_TESTED[1]}, found "
        f"{transformers.__version__}: `voco-llama check` tells in seconds whether it computes right here"
    )

# Until 5.23: models take and return their cache as `past_key_values`, from 5.24 on as `cache`.
# To be deleted, with its uses, when the oldest version is 5.24.
CACHE = "past_key_values" if VERSION < (5, 24) else "cache"

# Until 5.22: `output_hidden_states` is a flag, from 5.23 on it may also name the layers that are kept.
# To be deleted, with its uses, when the oldest version is 5.23.
SELECTS_HIDDEN_STATES = VERSION >= (5, 23)

# Until 5.20: a prefill in chunks counts from the first column even where a cache holds columns already.
# To be deleted, with its uses, when the oldest version is 5.21.
CHUNKS_FOLLOW_A_CACHE = VERSION >= (5, 21)


class NamesOfCache:
    """Outputs whose cache is read by either name, whichever of them transformers has made the field."""


def _read_cache(outputs):
    """The cache, under the name of other versions of transformers."""
    return getattr(outputs, CACHE)


setattr(NamesOfCache, "cache" if CACHE == "past_key_values" else "past_key_values", property(_read_cache))
