import pytest
import torch

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor


@pytest.fixture(scope="module")
def embedded():
    model = VoCoLlamaForConditionalGeneration.from_pretrained(EMBEDDED_CHECKPOINT, dtype=torch.float32).eval()
    return model, VoCoLlamaProcessor.from_pretrained(EMBEDDED_CHECKPOINT)
