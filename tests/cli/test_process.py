"""The command as a user runs it, in processes of its own."""

import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest


COMMAND = Path(sys.executable).with_name("voco-llama")


def run(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(arg) for arg in args], capture_output=True, text=True, timeout=300, **kwargs)


def test_help_lists_the_commands():
    result = run(COMMAND, "--help")
    assert result.returncode == 0 and not result.stderr
    for command in ("ask", "compress", "convert", "evaluate"):
        assert f" {command} " in result.stdout


def test_version(invoke):
    assert run(COMMAND, "--version").stdout == f"voco-llama {version('voco-llama-hf')}\n"
    assert "ask" in invoke().stdout


def test_compress_once_and_ask(invoke, checkpoint, images, tmp_path):
    cache = tmp_path / "cache.safetensors"
    result = run(COMMAND, "compress", *images, "--model", checkpoint, "-k", "2", "--output", cache)
    assert (result.returncode, result.stderr) == (0, "")
    question = ["What differs?", "--model", checkpoint, "--max-new-tokens", "6"]
    result = run(COMMAND, "ask", "--cache", cache, *question)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == invoke("ask", *images, "-k", 2, *question).stdout


# The command, which says that it opens the image and then takes long to
SLOW_COMMAND = """
import sys, time
from voco_llama_cli import app

def wait(event, arguments):
    if event == "open" and str(arguments[0]).endswith("image0.png"):
        print("opened", flush=True)
        time.sleep(300)

sys.addaudithook(wait)
app()
"""


def test_ctrl_c(checkpoint, images):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, "ask", "--model", checkpoint, images[0], "What?"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == b"opened\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == 130


def test_help_does_not_wait_for_torch():
    code = "import sys, voco_llama_cli; sys.exit(bool({'torch', 'transformers', 'PIL', 'gradio'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("command", "extra"), [("serve", "fastapi"), ("demo", "gradio")])
@pytest.mark.parametrize("host", ["256.1.1.1", "203.0.113.7", "a" * 300])
def test_a_host_that_is_no_address_of_this_machine(command, extra, host):
    """One line, and an end: before the model is loaded."""
    pytest.importorskip(extra)
    arguments = [sys.executable, "-m", "voco_llama_cli", command, "--host", host]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: cannot listen at") and result.stderr.count("\n") == 1
