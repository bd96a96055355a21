"""ONNX Runtime sessions that read and write torch tensors where they are."""

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto

from .providers import CUDA_PROVIDERS, resolve_providers


DTYPES = {
    "tensor(float)": (torch.float32, TensorProto.FLOAT),
    "tensor(float16)": (torch.float16, TensorProto.FLOAT16),
    "tensor(bfloat16)": (torch.bfloat16, TensorProto.BFLOAT16),
    "tensor(int64)": (torch.int64, TensorProto.INT64),
}


class TorchSession:
    """
    A session of one graph. Inputs and outputs are bound in place: nothing is copied through host memory.

    Args:
        path (`Path`):
            The graph; its weights may lie beside it.
        providers (`list[tuple[str, dict]]`, *optional*):
            Execution providers with their options, from [`resolve_providers`]; inputs and outputs are on the device of
            the first. By default the CPU's.
        session_options (`onnxruntime.SessionOptions`, *optional*):
            Options of the session.

    Raises:
        ValueError: if the graph cannot be opened or was not exported by this package.
    """

    def __init__(
        self,
        path: Path,
        providers: list[tuple[str, dict[str, Any]]] | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
    ):
        given = resolve_providers() if providers is None else providers
        provider, options = given[0]
        self.device = (
            torch.device("cuda", int(options["device_id"])) if provider in CUDA_PROVIDERS else torch.device("cpu")
        )
        try:
            self.session = onnxruntime.InferenceSession(str(path), session_options, providers=given)
        except Exception as error:  # ONNX Runtime's own errors share no class
            raise ValueError(f"ONNX Runtime cannot open {path}: {' '.join(str(error).split())}") from error
        # Otherwise a provider whose libraries do not load is left out with a warning
        if self.session.get_providers()[0] != provider:
            raise ValueError(f"{provider} could not be started, only {', '.join(self.session.get_providers())}")
        self.session.disable_fallback()
        for values in (self.session.get_inputs(), self.session.get_outputs()):
            for value in values:
                if value.type not in DTYPES:
                    raise ValueError(f"{path} is not a graph of this package: {value.name} is a {value.type}")
        self.input_types = {value.name: DTYPES[value.type] for value in self.session.get_inputs()}
        self.output_types = {value.name: DTYPES[value.type] for value in self.session.get_outputs()}
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def run(
        self, inputs: dict[str, torch.Tensor], output_shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            inputs (`dict[str, torch.Tensor]`): One tensor an input, moved and cast where it has to be.
            output_shapes (`dict[str, tuple[int, ...]]`): Shape of every output.
        """
        binding = self.session.io_binding()
        alive = []
        for name, (dtype, element_type) in self.input_types.items():
            # ONNX Runtime reads integers, which shapes are made of, on the host
            device = self.device if dtype.is_floating_point else torch.device("cpu")
            tensor = inputs[name].to(device, dtype).contiguous()
            # An empty tensor has no address, which ONNX Runtime refuses
            buffer = tensor if tensor.numel() else tensor.new_empty(1)
            alive.append(buffer)
            binding.bind_input(
                name, device.type, device.index or 0, element_type, tuple(tensor.shape), buffer.data_ptr()
            )
        outputs = {}
        for name, shape in output_shapes.items():
            dtype, element_type = self.output_types[name]
            outputs[name] = torch.empty(shape, dtype=dtype, device=self.device)
            binding.bind_output(
                name, self.device.type, self.device.index or 0, element_type, shape, outputs[name].data_ptr()
            )
        # ONNX Runtime has a stream of its own
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        if self.device.type == "cuda":
            binding.synchronize_outputs()
        return outputs
