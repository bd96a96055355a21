"""What is released: wheel and sdist, and the wheel where nothing else of this project is."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from voco_llama_hf import __version__


ROOT = Path(__file__).parents[2]
SHIPPED = (
    "voco_llama_cli/ask.py",
    "optimum/commands/register/register_voco_llama.py",
    "voco_llama_hf/checkpoints/voco-scenes-tiny/model.safetensors",
    "voco_llama_hf/checkpoints/voco-scenes-tiny/chat_template.jinja",
    "voco_llama_hf/checkpoints/voco-scenes-576/model.safetensors",
    "voco_llama_hf/py.typed",
    "voco_llama_cli/py.typed",
    "voco_llama_hf/hub/model_card.md",
    "voco_llama_hf/hub/attention.png",
    "voco_llama_hf/modeling/modeling_voco_llama.py",
    "voco_llama_hf/scenes/recipes/tiny.yaml",
    "voco_llama_hf/training/accelerate_configs/fsdp2.yaml",
)


def run(*command, **options) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(source: Path, target: Path, *kinds: str) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", target, source)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """The sdist, and the wheel that is built from it: those in DIST, if it is set."""
    if given := os.environ.get("DIST"):
        return Path(given)
    target = tmp_path_factory.mktemp("dist")
    build(ROOT, target)
    return target


def files(wheel: Path) -> dict[str, int]:
    """Name and checksum of every file but the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {file.filename: file.CRC for file in archive.infolist() if not file.filename.endswith("/RECORD")}


def the_wheel(folder: Path) -> Path:
    return next(folder.glob(f"voco_llama_hf-{__version__}-*.whl"))


def test_sdist_builds_the_same_wheel(dist, tmp_path):
    build(ROOT, tmp_path, "--wheel")
    shipped = files(the_wheel(dist))
    assert shipped == files(the_wheel(tmp_path))
    assert set(SHIPPED) <= set(shipped)
    # Optimum's namespace is its own, and tests are no part of a wheel
    assert not {name for name in shipped if name in ("optimum/__init__.py",) or name.startswith(("tests", "docs"))}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} <= names


def make_environment(folder: Path, *pip_options: str) -> Path:
    run(sys.executable, "-m", "venv", *pip_options, folder)
    return folder / "bin" / "python"


def check_environment(python: Path, folder: Path) -> None:
    """The installed package answers in another folder, from what it ships."""
    for package in ("voco_llama_hf", "voco_llama_cli"):
        code = f"from importlib.util import find_spec; print(find_spec('{package}').origin)"
        assert Path(run(python, "-c", code, cwd=folder)).is_relative_to(python.parents[1])
    command = python.with_name("voco-llama")
    assert run(command, "--version", cwd=folder) == f"voco-llama {__version__}\n"
    scene = ROOT / "examples" / "scene.png"
    assert run(command, "ask", scene, "What colour is the circle?", cwd=folder) == "orange\n"


def test_wheel_in_an_environment_of_its_own(dist, tmp_path):
    python = make_environment(tmp_path / "venv", "--without-pip")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, the_wheel(dist))
    # The dependencies of this environment, and not the package: what a path file adds has its own path files left out
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    check_environment(python, tmp_path)
    code = "from optimum.commands.register import register_voco_llama as r; print(r.__file__, r.REGISTER_COMMANDS)"
    assert str(packages) in run(python, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_wheel_in_an_empty_environment(dist, tmp_path):
    """Pip finds every dependency; TORCH is the build of PyTorch to take, as for make."""
    python = make_environment(tmp_path / "venv")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*install, *os.environ.get("TORCH", "torch").split())
    run(*install, the_wheel(dist))
    check_environment(python, tmp_path)
