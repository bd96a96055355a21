"""A version of transformers that is too old is told in one line, wherever it is met first."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from modeling.helpers import build_processor, tiny_model


ROOT = Path(__file__).parents[2]
MESSAGE = "VoCo-LLaMA's code needs transformers >= 5.19, found {}: pip install --upgrade transformers"
SCRIPT = """
import json, sys, transformers

def message(load):
    try:
        load()
    except ImportError as error:
        return str(error)

folder = sys.argv[1]
messages = {"version": transformers.__version__}
for name in ("AutoConfig", "AutoProcessor", "AutoModel", "AutoModelForImageTextToText"):
    auto_class = getattr(transformers, name)
    messages[name] = message(lambda: auto_class.from_pretrained(folder, trust_remote_code=True))
messages["pipeline"] = message(
    lambda: transformers.pipeline("image-text-to-text", model=folder, trust_remote_code=True)
)
sys.path.insert(0, sys.argv[2])
messages["package"] = message(lambda: __import__("voco_llama_hf"))
print(json.dumps(messages))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny-voco-llama"
    processor = build_processor()
    tiny_model(voco_token_id=processor.image_token_id).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.16.*", "5.0.*", "4.57.*"])
def test_the_version_that_is_needed_is_told(version, folder, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, f"transformers=={version}"], check=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    # Behind its own packages those of this environment, for PyTorch and Pillow
    (packages / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}

    def run(*command) -> subprocess.CompletedProcess:
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    result = run(python, "-c", SCRIPT, folder, ROOT / "src")
    assert result.returncode == 0, result.stderr
    messages = json.loads(result.stdout.splitlines()[-1])
    expected = MESSAGE.format(messages.pop("version"))
    assert messages == dict.fromkeys(messages, expected)

    environment["PYTHONPATH"] = str(ROOT / "src")
    result = run(
        python, "-c", "from voco_llama_cli import app; app()", "ask", ROOT / "examples" / "scene.png", "What?"
    )
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"Error: {expected}\n")
