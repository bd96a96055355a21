"""The folder of the Space: what the Hub reads of it, and that its app starts."""

import ast
import tomllib
from pathlib import Path

import gradio
import httpx2
from demo.conftest import free_port, running
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import voco_llama_hf.demo


SPACE = Path(voco_llama_hf.demo.__file__).parent / "space"
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_front_matter():
    card = RepoCard.load(SPACE / "README.md").data.to_dict()
    assert card["sdk"] == "gradio" and (SPACE / card["app_file"]).is_file()
    # The version that the Hub installs is one that the extra takes
    project = tomllib.loads(PROJECT.read_text())["project"]
    (wanted,) = [need for need in map(Requirement, project["optional-dependencies"]["demo"]) if need.name == "gradio"]
    assert wanted.specifier.contains(card["sdk_version"]) and wanted.specifier.contains(gradio.__version__)
    assert SpecifierSet(project["requires-python"]).contains(card["python_version"])
    assert len(card["short_description"]) <= 60  # the Hub refuses longer ones


def test_requirements():
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    (need,) = [Requirement(line) for line in lines if not line.startswith("--")]
    assert need.name == "voco-llama-hf" and need.extras == {"demo"}


def test_app_needs_no_command_line():
    nodes = ast.walk(ast.parse((SPACE / "app.py").read_text()))
    imported = {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"voco_llama_hf"}


def test_app_starts_and_serves():
    environment = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(free_port())}
    with running(str(SPACE / "app.py"), **environment) as (process, address):
        response = httpx2.get(address, timeout=60)
        folder = Path(httpx2.post(f"{address}/gradio_api/upload", files={"files": ("a", b"b")}).json()[0])
        assert folder.is_file()
    assert response.status_code == 200 and "VoCo-LLaMA" in response.text
    # Uploads do not stay behind
    assert process.returncode == 143 and not folder.exists()
