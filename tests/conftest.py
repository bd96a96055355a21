"""Settings of all tests. Puts its own folder on the path, for `from modeling.helpers import tiny_model`."""

import os

import pytest


# Nothing that is tested needs the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def transformers_verbosity():
    """Puts back what commands change for their process: how much transformers and the Hub's client say."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    before = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(before[0])
    hub_logging.set_verbosity(before[1])
    if before[2]:
        logging.enable_progress_bar()


@pytest.fixture(scope="session")
def s3_server():
    """Where moto's server listens, `None` if it is not installed. One for all tests: fsspec keeps its connections."""
    try:
        from moto.server import ThreadedMotoServer
    except ImportError:
        yield None
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
