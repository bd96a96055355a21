"""Weights of four bits, by ONNX Runtime's own quantizer."""

import tempfile
from pathlib import Path

import onnx_ir
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer


BLOCK_SIZE = 32


def quantize_to_int4(program: onnx_ir.Model) -> onnx_ir.Model:
    """
    Replaces matrix products by `MatMulNBits`: symmetric four-bit weights in blocks of 32 with a scale each.
    """
    # Through files with external data, which have no limit of 2 GB
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model.onnx", Path(folder) / "quantized.onnx"
        onnx_ir.save(program, source, external_data="model.onnx.data")
        # Accuracy level 4 computes with int8 activations, which is what makes it fast on a CPU
        quantizer = MatMulNBitsQuantizer(str(source), block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=4)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), True)
        quantized = onnx_ir.load(target)
        onnx_ir.external_data.load_to_model(quantized)
        return quantized
