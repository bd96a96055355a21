"""A Hugging Face Space of the demo. The variable MODEL names another model than the package's own."""

import os

import torch

from voco_llama_hf import EMBEDDED_CHECKPOINT, VoCoLlamaForConditionalGeneration, VoCoLlamaProcessor
from voco_llama_hf.demo import DemoEngine
from voco_llama_hf.demo.launch import launch


name = os.environ.get("MODEL") or EMBEDDED_CHECKPOINT
model = VoCoLlamaForConditionalGeneration.from_pretrained(name, dtype="auto")
if torch.cuda.is_available():
    model.cuda()  # type: ignore[call-arg]  # whose wrapper in transformers has no type
engine = DemoEngine(model.eval(), VoCoLlamaProcessor.from_pretrained(name))
engine.warm_up()
launch(
    engine,
    name,
    host=os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0"),
    port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")),
)
