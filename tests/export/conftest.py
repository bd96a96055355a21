from pathlib import Path

import pytest
from modeling.helpers import build_processor, tiny_model

from voco_llama_hf.export import ORTVoCoLlamaForConditionalGeneration, export_onnx


@pytest.fixture(scope="session")
def torch_model():
    """A random model of two layers."""
    return tiny_model(text={"num_hidden_layers": 2})


@pytest.fixture(scope="session")
def exported(torch_model, tmp_path_factory) -> Path:
    """`torch_model` in ONNX."""
    folder = tmp_path_factory.mktemp("onnx") / "exported"
    export_onnx(torch_model, folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def processor():
    return build_processor()


@pytest.fixture(scope="session")
def small_model(processor):
    """One layer, exported in seconds, and with the tokens of `processor`."""
    return tiny_model(voco_token_id=processor.image_token_id, text={"num_hidden_layers": 1})


@pytest.fixture(scope="session")
def ort_model(exported):
    return ORTVoCoLlamaForConditionalGeneration.from_pretrained(exported)
