"""`python -m voco_llama_cli`, which launchers of several processes can start."""

from . import app


app()
