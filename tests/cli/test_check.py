"""`voco-llama check` tells machines on which the model computes right from those on which it does not."""

import re

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from typer.testing import CliRunner

from voco_llama_cli import app


CHECKED = (
    "single pass and two stages",
    "answers",
    "chunked prefill",
    "static cache",
    "second turn with images",
    "sliding window",
)


def test_all_ways_of_computing_agree(invoke, checkpoint):
    first, *lines = invoke("check", "--model", checkpoint, "--device", "cpu").stdout.splitlines()
    assert first == (
        f"transformers {transformers.__version__}, torch {torch.__version__}, cpu, float32, sdpa attention"
    )
    assert [line.split(":")[0] for line in lines] == [f"agrees  {name}" for name in CHECKED]


def test_data_type_and_attention_are_those_asked_for(invoke, checkpoint):
    options = ["--device", "cpu", "--dtype", "bfloat16", "--attn-implementation", "eager"]
    first, *lines = invoke("check", "--model", checkpoint, *options).stdout.splitlines()
    assert first.endswith("cpu, bfloat16, eager attention")
    assert len(lines) == len(CHECKED) and all(line.startswith("agrees") for line in lines)


def sees_everything(module, query, key, value, attention_mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": False})


def fails(module, query, key, value, attention_mask, **kwargs):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize(
    "attention, verdict",
    [(sees_everything, "DIFFERS  {}: [^ ]+ "), (fails, "DIFFERS  {}: RuntimeError: no kernel image is available$")],
)
def test_what_computes_wrong_is_found(checkpoint, attention, verdict, transformers_verbosity):
    # As users register theirs
    name = attention.__name__
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    command = ["check", "--model", str(checkpoint), "--device", "cpu", "--attn-implementation", name]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1 and result.stderr == ""
    lines = result.stdout.splitlines()[1:]
    assert len(lines) == len(CHECKED)
    assert all(re.match(verdict.format(name), line) for name, line in zip(CHECKED, lines))


@pytest.mark.parametrize("name", ["flash_attention_2", "nonsense"])
def test_an_attention_that_is_not_there_is_one_line(invoke, checkpoint, name):
    invoke("check", "--model", checkpoint, "--device", "cpu", "--attn-implementation", name, exit_code=1)
