import re
from pathlib import Path

import pytest

from voco_llama_hf import VoCoLlamaConfig


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
SOURCE, TOWER = GOLDEN / "original_checkpoint", GOLDEN / "clip-vit-tiny"


def test_convert(invoke, tmp_path):
    target = tmp_path / "target"
    result = invoke(
        *("convert", SOURCE, target, "--vision-tower", TOWER, "--num-voco-tokens", 2, "--dtype", "bfloat16"),
        *("--vision-prefix-ids", "1", "--vision-suffix-ids", "13, 14"),
    )
    for name, value in (
        ("source format", "llava_llama"),
        ("voco token id", "32000"),
        ("num voco tokens", "2"),
        ("vision suffix token ids", r"\[13, 14\]"),
        ("dtype", "bfloat16"),
        ("processor written", "False"),
    ):
        assert re.search(f"{name} +{value} ", result.stdout)
    assert re.fullmatch("Warning: .* has no tokenizer: no processor was written.*\n", result.stderr)
    config = VoCoLlamaConfig.from_pretrained(target)
    assert (config.num_voco_tokens, config.vision_suffix_token_ids) == (2, [13, 14])


def test_no_ids_at_all(invoke, tmp_path):
    invoke("convert", SOURCE, tmp_path / "target", "--vision-tower", TOWER, "--vision-suffix-ids", "")
    assert VoCoLlamaConfig.from_pretrained(tmp_path / "target").vision_suffix_token_ids == []


@pytest.mark.parametrize(
    ("args", "exit_code", "message"),
    [
        ([], 2, "Missing argument 'SOURCE'"),
        (["{source}"], 2, "Missing argument 'TARGET'"),
        (["{source}", "{new}", "--vision-prefix-ids", "one"], 2, "takes numbers like 1,2,4"),
        (["{source}", "{new}", "--num-voco-tokens", "0"], 2, "Invalid value for '--num-voco-tokens'"),
        (["{source}", "{new}", "--dtype", "int4"], 2, "'int4' is not one of"),
        (["{new}", "{new}"], 1, "does not exist"),
        (["{source}", "{full}"], 1, "already exists and is not empty"),
        (["{source}", "{new}", "--vision-tower", "{source}"], 1, "vision tower"),
        (["{source}", "{new}", "--vision-tower", "{tower}", "--vision-suffix-ids", "99999"], 1, "ids of 0 to 32000"),
        (["{tower}", "{new}"], 1, "model_type 'clip_vision_model'"),
    ],
)
def test_errors(invoke, tmp_path, args, exit_code, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    places = {"source": SOURCE, "tower": TOWER, "new": tmp_path / "new", "full": tmp_path / "full"}
    args = [arg.format(**places) for arg in args]
    assert message in invoke("convert", *args, exit_code=exit_code).stderr
    assert not (tmp_path / "new").exists()
