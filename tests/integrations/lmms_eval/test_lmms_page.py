"""The commands of lmms-eval on its page are ones that it takes."""

import inspect
import re
import shlex
from pathlib import Path

import pytest


pytest.importorskip("lmms_eval.api.model")

PAGE = Path(__file__).parents[3] / "docs" / "source" / "lmms_eval.md"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [words for block in blocks if (words := shlex.split(block.replace("\\\n", " ")))[0] == "lmms-eval"]


@pytest.mark.parametrize("words", commands(), ids=lambda words: words[2])
def test_commands(words, monkeypatch):
    from lmms_eval.__main__ import parse_eval_args
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import simple_parse_args_string

    monkeypatch.setattr("sys.argv", words)
    _, args = parse_eval_args()
    parameters = inspect.signature(
        get_model(args.model).__mro__[1 if args.model == "openai" else 0].__init__
    ).parameters
    assert set(simple_parse_args_string(args.model_args)) <= set(parameters)
    assert set(args.tasks.split(",")) <= set(TaskManager("ERROR").all_tasks)


def test_tasks_of_the_paper():
    from lmms_eval.tasks import TaskManager

    (line,) = re.findall(r"--suite lmms (gqa mmbench.*?)\\", PAGE.read_text())
    assert {name.partition(":")[0] for name in line.split()} <= set(TaskManager("ERROR").all_tasks)
