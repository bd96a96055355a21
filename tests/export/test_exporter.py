"""What an export writes, and what it refuses."""

import copy
import importlib
import importlib.metadata
import math
import os
import shutil
import signal
import sys
from dataclasses import replace

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling.helpers import VOCO, build_processor, random_inputs, tiny_model
from transformers import AutoProcessor, Qwen3Config

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaConfig, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx
from voco_llama_hf.export.answers import LIMITS, answer, ask, check_answers, compare_answers, default_pictures
from voco_llama_hf.export.graphs import build_graphs
from voco_llama_hf.export.providers import resolve_providers
from voco_llama_hf.export.validation import (
    SIZES,
    Difference,
    check_differences,
    relative_difference,
    seeded_sample,
)


FILES = {
    *("compressor_model.onnx", "compressor_model.onnx.data", "decoder_model.onnx", "decoder_model.onnx.data"),
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"),
}
# To ask little
FEW = {"images": default_pictures()[:1], "questions": ["What?"]}


def test_the_folder_is_complete(exported):
    assert {path.name for path in exported.iterdir()} >= FILES
    assert isinstance(VoCoLlamaConfig.from_pretrained(exported), VoCoLlamaConfig)
    assert AutoProcessor.from_pretrained(exported).image_token == "<image>"


def test_names_and_axes_of_the_graphs(exported):
    """As Optimum has them, so that other tools recognise them."""
    compressor, decoder = (
        onnxruntime.InferenceSession(exported / f"{name}_model.onnx") for name in ("compressor", "decoder")
    )
    images = {value.name: value.shape for value in compressor.get_inputs()}
    assert images == {"pixel_values": ["num_images", 3, 28, 28], "num_voco_tokens": []}
    axes = {value.name: value.shape for value in (*decoder.get_inputs(), *decoder.get_outputs())}
    assert axes["input_ids"] == axes["position_ids"] == ["batch_size", "sequence_length"]
    assert axes["attention_mask"] == ["batch_size", "past_length + sequence_length"]
    assert axes["past_key_values.1.value"] == ["batch_size", 2, "past_length", 16]
    assert axes["logits"] == ["batch_size", "sequence_length", 128]
    assert axes["present.0.key"] == ["batch_size", 2, "past_length + sequence_length", 16]
    assert len(axes) == 3 + 4 + 1 + 4


def test_four_bits(small_model, processor, tmp_path, generous):
    """Weights of a fraction of the size, in half precision, whose answers are still near."""
    export_onnx(small_model, tmp_path / "exported", processor, precision="fp16", quantize="int4", **FEW)
    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert_near(model, small_model, 0.5)
    decoder = (small_model.model.language_model, small_model.lm_head)
    in_fp32 = sum(weight.nbytes for part in decoder for weight in part.parameters())
    assert (tmp_path / "exported" / "decoder_model.onnx.data").stat().st_size < 0.3 * in_fp32
    assert (model.dtype, small_model.dtype) == (torch.float16, torch.float32)


def test_eight_bits_of_another_text_model(processor, tmp_path, generous):
    model = tiny_model(text_class=Qwen3Config, voco_token_id=processor.image_token_id, text={"num_hidden_layers": 1})
    export_onnx(model, tmp_path / "exported", processor, quantize="int8", opset=20, **FEW)
    graph = onnx.load(tmp_path / "exported" / "decoder_model.onnx", load_external_data=False)
    assert next(opset.version for opset in graph.opset_import if opset.domain == "") == 20
    assert any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in graph.graph.node)
    assert_near(ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "exported"), model, 0.3)


def with_tokens_of(model, inputs: dict) -> dict:
    """Inputs whose `<voco>` tokens are those of a model with another id."""
    ids = inputs["input_ids"]
    ids = torch.where(ids == model.config.voco_token_id, ids + 1, ids)
    return {**inputs, "input_ids": torch.where(ids == VOCO, model.config.voco_token_id, ids)}


def assert_near(ort_model, model, tolerance: float):
    inputs = with_tokens_of(model, random_inputs(model, [["image:2", "text:5"]]))
    with torch.no_grad():
        expected = model(**inputs).logits[:, 2:]
    difference = ort_model(**inputs).logits[:, 2:].float() - expected
    assert difference.norm() < tolerance * expected.norm()


def test_fused_on_the_fly_and_saved(small_model, processor, tmp_path):
    """Graphs for the CPU provider have ONNX Runtime's own operators; the processor is beside them."""
    small_model.save_pretrained(tmp_path / "torch")
    processor.save_pretrained(tmp_path / "torch")
    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(
        tmp_path / "torch", export=True, provider="CPUExecutionProvider", **FEW
    )
    model.save_pretrained(tmp_path / "saved")
    del model
    asked = {"images": [default_pictures()[0]], "text": ["<image>\nWhat?"], "return_tensors": "pt"}
    own = AutoProcessor.from_pretrained(tmp_path / "saved")(**asked)
    assert all(torch.equal(own[name], value) for name, value in processor(**asked).items())
    graph = onnx.load(tmp_path / "saved" / "decoder_model.onnx", load_external_data=False).graph
    assert any(node.domain == "com.microsoft" for node in graph.node)
    saved = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    inputs = random_inputs(small_model, [["text:2", "image:2", "text:5"], ["image:1", "text:2"]])
    inputs = with_tokens_of(small_model, inputs)
    expected = small_model.generate(**inputs, do_sample=False, max_new_tokens=6)
    assert torch.equal(saved.generate(**inputs, do_sample=False, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision must be one of fp32, fp16, bf16, got 'fp8'"),
        ({"quantize": "int2"}, "quantize must be one of int8, int4"),
        ({"provider": "AbacusExecutionProvider"}, "no AbacusExecutionProvider, it has .*CPUExecutionProvider.*export"),
        ({"precision": "bf16"}, "has no bf16 kernels"),
        ({"precision": "fp16", "quantize": "int8"}, "int8 is quantized from fp32"),
        ({"quantize": "int4"}, "needs the model's processor"),
        ({"questions": ["What?"]}, "needs the model's processor"),
        ({"images": []}, "images is empty"),
        ({"processor": build_processor(), "questions": ["What is <image>?"]}, "the question has <image> in it"),
    ],
)
def test_bad_arguments(small_model, tmp_path, options, message):
    if "images" in options:
        options = {**options, "processor": build_processor()}
    with pytest.raises(ValueError, match=message):
        export_onnx(small_model, tmp_path / "exported", **options)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_are_taken(small_model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    for output, message in (("full", "is not empty"), ("full/file", "is a file"), ("no/where", "is not a folder")):
        with pytest.raises(OSError, match=message):
            export_onnx(small_model, tmp_path / output)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full"]


@pytest.fixture
def full_disk():
    """The limit of the process on the size of a file stands for the end of the disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_of_an_export(small_model, tmp_path, full_disk):
    with pytest.raises(OSError):
        export_onnx(small_model, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_of_a_copy(ort_model, tmp_path, full_disk):
    with pytest.raises(OSError):
        ort_model.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_not_taken(small_model, torch_model, tmp_path):
    """An adapter is merged first, and a processor belongs to its model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    with pytest.raises(ValueError, match=r"merge it first, with model.merge_and_unload\(\)"):
        export_onnx(peft.get_peft_model(copy.deepcopy(small_model), config), tmp_path / "exported")
    with pytest.raises(ValueError, match="takes a VoCoLlamaForConditionalGeneration, got a VoCoLlamaModel"):
        export_onnx(small_model.model, tmp_path / "exported")
    with pytest.raises(ValueError, match="id of <voco> is 3, the model's is 127"):
        export_onnx(torch_model, tmp_path / "exported", build_processor())
    assert list(tmp_path.iterdir()) == []


def test_old_versions_of_transformers(monkeypatch):
    """One line says which is needed, from the module and from the command."""
    real = importlib.metadata.version
    old = lambda name: "5.22.1" if name == "transformers" else real(name)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "version", old)
    for name in [name for name in sys.modules if name.startswith("voco_llama_hf.export")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"transformers>=5.23 is required .* found transformers==5.22.1"):
        importlib.import_module("voco_llama_hf.export")


def test_beyond_tolerance():
    fine = Difference("decoder", {"batch_size": 1}, 1e-4, 1e-5, "logits", 1e-3, 1e-3)
    check_differences([fine, replace(fine, relative=0.9, absolute=7.0, rtol=None, atol=None)])
    for change in (
        {"absolute": 1e-2},
        {"relative": 1e-2},
        {"relative": math.nan},
        {"relative": math.inf, "rtol": None},
    ):
        bad = replace(fine, sizes={"batch_size": 3}, **change)
        with pytest.raises(ValueError, match=r"1 of 2 runs .* the decoder at batch_size=3: logits"):
            check_differences([fine, bad])


@settings(max_examples=50, deadline=None)
@given(zeros=st.booleans(), error=st.sampled_from([0.0, 1e-4, 1e-2, math.nan]), seed=st.integers(0, 9))
def test_zeros_are_numbers(zeros, error, seed):
    """What PyTorch computes as zero, in part or as a whole, is compared as any other number."""
    torch.manual_seed(seed)
    expected = torch.zeros(3, 4) if zeros else torch.randn(3, 4).relu()
    found = relative_difference(expected + error, expected)
    assert math.isnan(found) if math.isnan(error) else error / 5 <= found <= 5 * error


def test_inputs_are_the_same_every_time(torch_model):
    """Whatever the random numbers of the process, which stay as they are."""
    samples = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with torch.no_grad():
            sample = [seeded_sample(graph, SIZES[graph.name][2]) for graph in build_graphs(torch_model)]
        samples.append(torch.utils._pytree.tree_leaves(sample))
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first, second) for first, second in zip(*samples, strict=True))


@pytest.fixture
def generous(monkeypatch):
    """Random weights lose more to few bits than trained ones, and hardly prefer any token."""
    for kind in ("int4", "int8"):
        monkeypatch.setitem(LIMITS, kind, (0.1, 0.9))


def test_answers_decide(small_model, processor, tmp_path):
    """Graphs of this model answer as it does, those of another do not."""
    export_onnx(small_model, tmp_path / "exported", processor, **FEW)
    exported = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "exported")
    asked = processor, "int4", default_pictures()[:1], ["What is this?", "Where?"]
    answers = compare_answers(small_model, exported, *asked)
    assert answers.num_same == answers.num_tokens == 2 * 2 * 16
    assert answers.difference < 1e-4
    assert answers == compare_answers(small_model, exported, *asked)
    other = tiny_model(1, voco_token_id=processor.image_token_id, text={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"in int4 the graphs answer otherwise than PyTorch: \d+ of 64 tokens"):
        check_answers(compare_answers(other, exported, *asked), "int4")


def test_an_answer_ends_with_its_end(small_model, processor):
    """Padding behind it is no part of it."""
    model = copy.deepcopy(small_model)
    inputs = ask(processor, default_pictures()[0], ["What?", "Where is it?"], 1)
    ids, is_answer = answer(model, dict(inputs))[0]["input_ids"], None
    length = inputs["input_ids"].shape[1]
    model.generation_config.eos_token_id = int(ids[0, length + 2])
    answered, is_answer = answer(model, dict(inputs))
    assert is_answer[0].sum() == 3 or int(ids[0, length + 2]) in ids[0, length : length + 2]
    assert torch.equal(is_answer[:, length - 1 :].long(), answered["attention_mask"][:, length:])


@pytest.mark.parametrize("options", [{"opset": 23}, {"opset": 23, "provider": "CPUExecutionProvider"}])
def test_the_operators_of_opset_23(small_model, tmp_path, options):
    """Several images at once, whose angles PyTorch broadcasts."""
    report = export_onnx(small_model, tmp_path / "exported", **options)
    assert all(difference.is_fine for difference in report.differences)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "fp16"}, {"quantize": "int8"}, {"quantize": "int4"}, {"precision": "fp16", "quantize": "int4"}],
)
def test_every_kind_of_the_embedded_checkpoint(tmp_path, options):
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32)
    answers = export_onnx(
        model, tmp_path / "exported", VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT), **options
    ).answers
    assert answers.num_tokens > 100 and answers.num_same >= 0.95 * answers.num_tokens


@pytest.mark.parametrize("name", ["decoder_model.onnx", "compressor_model.onnx", "decoder_model.onnx.data"])
def test_damaged_graphs(exported, tmp_path, name):
    for path in exported.iterdir():
        if path.is_file():
            os.link(path, tmp_path / path.name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"cannot open .*{name.removesuffix('.data')}"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path)


def test_foreign_graphs(exported, tmp_path):
    """Graphs of another model: other names, other shapes."""
    for path in exported.iterdir():
        if path.is_file():
            os.link(path, tmp_path / path.name)
    config = VoCoLlamaConfig.from_pretrained(exported)
    config.text_config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"not a graph of this model: it has other outputs .* present.2"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path, config=config)
    config = VoCoLlamaConfig.from_pretrained(exported)
    config.text_config.num_key_value_heads = 4
    with pytest.raises(ValueError, match="not a graph of this model: its keys and values"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path, config=config)
    with pytest.raises(OSError, match=r"compressor_model.onnx"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path.parent)


def test_providers_that_are_not_there(exported):
    with pytest.raises(ValueError, match=r"no CUDAExecutionProvider, it has .*export-gpu brings onnxruntime-gpu"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(exported, provider="CUDAExecutionProvider")


def test_providers_as_optimum_has_them(exported):
    """A list, options with them or beside them, and the flags of its models."""
    name = "CPUExecutionProvider"
    for options in ({"providers": [name]}, {"providers": [(name, {})]}, {"provider": name, "provider_options": {}}):
        model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(
            exported, **options, use_io_binding=True, trust_remote_code=True
        )
        assert model.decoder.session.get_providers() == [name]
    with pytest.raises(ValueError, match="no CUDAExecutionProvider"):
        resolve_providers(providers=["CUDAExecutionProvider", name])
    with pytest.raises(ValueError, match="1 providers, but provider_options for 2"):
        resolve_providers(providers=[name], provider_options=[{}, {}])
    with pytest.raises(ValueError, match="providers is empty"):
        resolve_providers(providers=[])
    with pytest.raises(TypeError, match="unexpected keyword arguments"):
        ORTVoCoLlamaForConditionalGeneration.from_pretrained(exported, use_cash=True)


@pytest.mark.parametrize("above", ["", "sub"])
def test_graphs_in_a_folder_of_the_model(exported, torch_model, tmp_path, above):
    """As a repository has them: graphs in `onnx`, whatever belongs to the model above them."""
    model_folder = tmp_path / above
    shutil.copytree(exported, model_folder / "onnx")
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"):
        (model_folder / "onnx" / name).rename(model_folder / name)
    expected = random_inputs(torch_model, [["image:2", "text:3"]])
    for options in ({}, {"subfolder": "onnx"}):
        place = "/".join(part for part in (above, options.get("subfolder", "")) if part)
        model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path, subfolder=place)
        answer = model.generate(**expected, do_sample=False, max_new_tokens=3)
        assert torch.equal(answer, torch_model.generate(**expected, do_sample=False, max_new_tokens=3))
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= FILES


def test_graphs_in_the_cache_of_the_hub(exported, tmp_path):
    """Its files are links to others, weights beside a graph too."""
    snapshot = tmp_path / "models--someone--exported" / "snapshots" / ("0" * 40)
    (tmp_path / "models--someone--exported" / "refs").mkdir(parents=True)
    (tmp_path / "models--someone--exported" / "refs" / "main").write_text("0" * 40)
    (tmp_path / "models--someone--exported" / "blobs").mkdir()
    (snapshot / "onnx").mkdir(parents=True)
    for number, path in enumerate(path for path in exported.iterdir() if path.is_file()):
        blob = shutil.copyfile(path, tmp_path / "models--someone--exported" / "blobs" / str(number))
        (snapshot / "onnx" / path.name).symlink_to(os.path.relpath(blob, snapshot / "onnx"))
    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained("someone/exported", cache_dir=tmp_path)
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= FILES
