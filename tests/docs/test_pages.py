"""The code of README and docs runs as printed, each page in a folder of its own, and prints what the page says."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from huggingface_hub.cli.hf import app as hub_app
from optimum.commands.register.register_voco_llama import VoCoLlamaOnnxExportCommand
from serving.conftest import serving
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser
from typer.main import get_command
from typer.testing import CliRunner

from voco_llama_cli import app
from voco_llama_cli.train import resolve_shipped


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "source"
PAGES = [ROOT / "README.md", *sorted(SOURCE.rglob("*.md"))]
# What a page says of the block that follows, where readers do not see it
DIRECTIVE = re.compile(r"<!-- (not run: .+|fails) -->\s*\Z")
SERVER_URL = "http://127.0.0.1:8000"


def directive(example: Example) -> str:
    found = DIRECTIVE.search(example.document.text, 0, example.start)
    return "" if found is None else found[1].split(":")[0]


def commands(block: str) -> Iterator[str]:
    """Lines of a shell, continued ones joined."""
    for line in re.sub(r"\\\n\s*", " ", block).splitlines():
        if shlex.split(line, comments=True):
            yield line


class Page:
    """Runs the blocks of one page in order; a block of `text` is what the block before it prints."""

    def __init__(self, resources: contextlib.ExitStack):
        self.resources = resources
        self.output = ""
        self.url = SERVER_URL

    def python(self, example: Example) -> None:
        if directive(example) == "not run":
            compile(example.parsed, example.path, "exec")
            return
        source = "\n" * example.line + example.parsed.replace(SERVER_URL, self.url)
        code = compile(source, example.path, "exec")
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            if directive(example) == "fails":
                with pytest.raises(Exception) as failure:
                    exec(code, example.namespace)
                print(f"{failure.type.__name__}: {failure.value}")
            else:
                exec(code, example.namespace)
        self.output = stdout.getvalue()

    def bash(self, example: Example) -> None:
        how = directive(example)
        self.output = ""
        for line in commands(example.parsed):
            words = shlex.split(line, comments=True)
            if how == "not run":
                check_words(words)
            elif words[:2] == ["voco-llama", "serve"]:
                server = self.resources.enter_context(serving(*words[2:], "--port", "0"))
                self.url = server.url.removesuffix("/v1")
            elif words[0] == "voco-llama":
                # In this process, where torch is imported already; tests/cli and tests/distribution start it
                result = CliRunner().invoke(app, words[1:])
                assert (result.exit_code != 0) == (how == "fails"), f"{line}\n{result.output}"
                self.output += result.stderr if how == "fails" else result.stdout
            else:
                path = f'export PATH="{Path(sys.executable).parent}:$PATH"'
                run = subprocess.run(["bash", "-euc", f"{path}\n{line}"], capture_output=True, text=True, timeout=300)
                assert run.returncode == 0, f"{line}\n{run.stderr}"
                self.output += run.stdout

    def text(self, example: Example) -> None:
        wanted, flags = str(example.parsed), ELLIPSIS | NORMALIZE_WHITESPACE
        if not OutputChecker().check_output(wanted, self.output, flags):
            pytest.fail(f"{example.path}:{example.line} says\n{wanted}\nbut this is printed:\n{self.output}")


def check_words(words: list[str]) -> None:
    """What cannot run here exists at least: the command with all its options, the target, the extra."""
    if words[0] == "voco-llama":
        check_command(get_command(app), words[1:])
    elif words[0] == "hf":
        check_command(hub_app, words[1:])
    elif words[:3] == ["optimum-cli", "export", "onnx"]:
        parser = ArgumentParser()
        VoCoLlamaOnnxExportCommand.parse_args(parser)
        parser.parse_args(words[3:])
    elif words[0] == "lmms-eval":
        pass  # tests/integrations/lmms_eval/test_lmms_page.py, where it is installed
    elif words[0] == "vllm" or words[:2] == ["python", "-m"]:
        pass  # in an environment of its own, by tests/integrations/vllm
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = [name for word in words for found in re.findall(r"\[(.+)\]", word) for name in found.split(",")]
        assert set(named) <= set(extras), words
    else:
        pytest.fail(f"what is not run must be checked, and nothing checks {words}")


def check_command(command: Any, args: list[str]) -> None:
    while hasattr(command, "resolve_command"):
        with command.make_context("", [], resilient_parsing=True) as context:
            name, command, args = command.resolve_command(context, args)
    if name == "train":
        check_training_flags(args)
    else:
        command.make_context(name, args)


def check_training_flags(args: list[str]) -> None:
    # TRL takes seconds to import
    from voco_llama_cli.train_script import make_parser

    args = resolve_shipped(args, "--config", "recipes")
    launch = "--accelerate_config" in args
    if launch:
        args = resolve_shipped(args, "--accelerate_config", "accelerate_configs")
        index = args.index("--accelerate_config")
        args = [*args[:index], *args[index + 2 :]]
    *_, left = make_parser().parse_args_and_config(args, return_remaining_strings=True)
    if launch:
        launch_command_parser().parse_args([*left, "script.py"])
    else:
        assert left == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_page(path, tmp_path, monkeypatch, transformers_verbosity):
    for name in ("examples", "benchmarks", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    torch.manual_seed(0)
    with contextlib.ExitStack() as resources:
        page = Page(resources)
        parsers = [CodeBlockParser(name, getattr(page, name)) for name in ("python", "bash", "text")]
        for example in Sybil(parsers).parse(path).examples():
            example.evaluate()
