"""The stages in order of worth, each a module of this package with a function `run`."""

from __future__ import annotations

from dataclasses import dataclass


TOTAL_LIMIT = 1500  # seconds, on one H100
DEVICE_IS_LOST = 3  # exit code of a stage: what is left can run in another process


@dataclass(frozen=True)
class Stage:
    """
    Args:
        name (`str`): Its module, and its file of results.
        limit (`int`): Seconds after which it is stopped; what it has measured stays, and a second run goes on.
        what (`str`): What it finds out.
    """

    name: str
    limit: int
    what: str


STAGES = (
    Stage("check", 170, "ways of computing agree on every attention, compiled decoding and CUDA graphs with them"),
    Stage("model_tests", 90, "the tests of the model, on the GPU"),
    Stage("question", 150, "a question about an image: the paper's Table 7, and the first token against text only"),
    Stage("decoding", 200, "tokens a second, plain and compiled, against reading the weights"),
    Stage("compression", 120, "compressing 1, 16 and 64 images, and 20,000 frames in 24 GB"),
    Stage("training", 130, "a step of training against one of LLaVA"),
    Stage("recipes", 160, "lora-24gb and qlora-24gb in 24 GB"),
    Stage("sharding", 90, "FSDP2 and ZeRO-3"),
    Stage("onnx_providers", 150, "ONNX Runtime's CUDA and TensorRT providers: parity, speed, copies"),
    Stage("vllm_engine", 120, "vLLM with the plugin against plain LLaVA"),
    Stage("findings", 120, "trainings on the paper's findings; every run goes on where the last one stopped"),
)
BY_NAME = {stage.name: stage for stage in STAGES}
