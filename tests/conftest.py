"""Settings of all tests. Puts its own folder on the path, for `from modeling.helpers import tiny_model`."""

import os


# Nothing that is tested needs the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
