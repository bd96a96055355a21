from pathlib import Path

import pytest
from modeling.helpers import build_processor, tiny_model
from PIL import Image
from typer.testing import CliRunner

from voco_llama_cli import app


def save_checkpoint(folder: Path, seed: int) -> Path:
    """A random model of 4 vision tokens an image, and its processor."""
    processor = build_processor()
    tiny_model(seed, voco_token_id=processor.image_token_id).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=0)


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("other_checkpoint"), seed=1)


@pytest.fixture
def images(tmp_path) -> list[Path]:
    """Three images that differ."""
    gradient = Image.linear_gradient("L").convert("RGB")
    paths = []
    for i, picture in enumerate((gradient, gradient.rotate(90), gradient.rotate(180))):
        paths.append(tmp_path / f"image{i}.png")
        picture.save(paths[-1])
    return paths


@pytest.fixture
def invoke(monkeypatch, transformers_verbosity):
    """Runs a command in this process and checks its exit code; errors must be one line on stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args, exit_code: int = 0):
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == exit_code, result.output
        if exit_code != 0:
            assert result.stdout == ""
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1
        return result

    return run
