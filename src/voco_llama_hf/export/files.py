"""Names of the files of an exported model."""

COMPRESSOR_FILE, DECODER_FILE = "compressor_model.onnx", "decoder_model.onnx"
VISION_FILE = "vision_model.onnx"  # only of models whose images have numbers of vision tokens of their own
FINGERPRINT = "voco_fingerprint"  # metadata of the compressor's graph


def data_file(file: str) -> str:
    """Where the weights of a graph go."""
    return f"{file}.data"
