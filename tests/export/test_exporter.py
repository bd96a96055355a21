"""What an export writes, and what it refuses."""

import os
import signal

import onnx
import onnxruntime
import pytest
import torch
from modeling.helpers import random_inputs, tiny_model
from transformers import AutoProcessor, Qwen3Config

from voco_llama_hf import VoCoLlamaConfig
from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx
from voco_llama_hf.export.validation import Difference, check_differences


FILES = {
    *("compressor_model.onnx", "compressor_model.onnx.data", "decoder_model.onnx", "decoder_model.onnx.data"),
    *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"),
}


@pytest.fixture(scope="module")
def small_model():
    """One layer: exports in seconds."""
    return tiny_model(text={"num_hidden_layers": 1})


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


def test_four_bits(small_model, tmp_path):
    """Weights of a fraction of the size, in half precision, whose answers are still near."""
    export_onnx(small_model, tmp_path / "exported", precision="fp16", quantize="int4")
    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "exported")
    assert_near(model, small_model, 0.5)
    decoder = (small_model.model.language_model, small_model.lm_head)
    in_fp32 = sum(weight.nbytes for part in decoder for weight in part.parameters())
    assert (tmp_path / "exported" / "decoder_model.onnx.data").stat().st_size < 0.3 * in_fp32
    assert (model.dtype, small_model.dtype) == (torch.float16, torch.float32)


def test_eight_bits_of_another_text_model(tmp_path):
    model = tiny_model(text_class=Qwen3Config, text={"num_hidden_layers": 1})
    export_onnx(model, tmp_path / "exported", quantize="int8", opset=20)
    graph = onnx.load(tmp_path / "exported" / "decoder_model.onnx", load_external_data=False)
    assert next(opset.version for opset in graph.opset_import if opset.domain == "") == 20
    assert any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in graph.graph.node)
    assert_near(ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "exported"), model, 0.3)


def assert_near(ort_model, model, tolerance: float):
    inputs = random_inputs(model, [["image:2", "text:5"]])
    with torch.no_grad():
        expected = model(**inputs).logits[:, 2:]
    difference = ort_model(**inputs).logits[:, 2:].float() - expected
    assert difference.norm() < tolerance * expected.norm()


def test_fused_on_the_fly_and_saved(small_model, tmp_path):
    """Graphs for the CPU provider have ONNX Runtime's own operators, and the same answers."""
    small_model.save_pretrained(tmp_path / "torch")
    model = ORTVoCoLlamaForConditionalGeneration.from_pretrained(
        tmp_path / "torch", export=True, provider="CPUExecutionProvider"
    )
    model.save_pretrained(tmp_path / "saved")
    del model
    graph = onnx.load(tmp_path / "saved" / "decoder_model.onnx", load_external_data=False).graph
    assert any(node.domain == "com.microsoft" for node in graph.node)
    saved = ORTVoCoLlamaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    inputs = random_inputs(small_model, [["text:2", "image:2", "text:5"], ["image:1", "text:2"]])
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
    ],
)
def test_bad_arguments(small_model, tmp_path, options, message):
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


def test_beyond_tolerance():
    fine = Difference("decoder", {"batch_size": 1}, 1e-4, 1e-5, 1e-3, "logits", True)
    check_differences([fine])
    for absolute, relative in ((1e-2, 1e-5), (1e-4, 1e-2), (float("nan"), float("nan"))):
        bad = Difference("decoder", {"batch_size": 3}, absolute, relative, 1e-3, "logits", True)
        with pytest.raises(ValueError, match=r"1 of 2 runs .* the decoder at batch_size=3: logits"):
            check_differences([fine, bad])


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
