"""
`optimum-cli export onnx` for VoCo-LLaMA. Optimum loads what lies in this namespace (PEP 420: no `__init__.py` here).
"""

from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


# What people tell Optimum's own export, and what is exported here in any case
MEANT_ANYWAY = {
    "--task": ["auto", "image-text-to-text", "image-text-to-text-with-past"],
    "--framework": ["pt"],
    "--library": ["transformers"],
}


def command_name() -> str:
    """`onnx`, unless optimum-onnx is installed, whose command keeps that name."""
    try:
        version("optimum-onnx")
    except PackageNotFoundError:
        return "onnx"
    return "onnx-voco"


class VoCoLlamaOnnxExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name=command_name(), help="Export a VoCo-LLaMA model to ONNX.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, help="Model folder or Hub id of a VoCo-LLaMA model.")
        parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default="fp32", help="Precision.")
        parser.add_argument("--quantize", choices=["int8", "int4"], help="Quantization of the weights.")
        parser.add_argument("--device", help="Device that PyTorch runs on.")
        parser.add_argument("--cache_dir", help="Folder that downloads go to.")
        parser.add_argument("--atol", type=float, help="Largest absolute difference from PyTorch.")
        parser.add_argument("--provider", help="Execution provider of ONNX Runtime to fuse the graphs for.")
        parser.add_argument("--opset", type=int, help="ONNX opset.")
        for flag, values in MEANT_ANYWAY.items():
            parser.add_argument(flag, choices=values, help="There is no other here.")
        parser.add_argument("--trust-remote-code", action="store_true", help="No code of a repository is run here.")
        parser.add_argument("output", help="Folder to write, new or empty.")

    def run(self) -> None:
        from voco_llama_cli import app

        options = {"precision": self.args.dtype, "quantize": self.args.quantize, "provider": self.args.provider}
        options |= {"opset": self.args.opset, "device": self.args.device, "atol": self.args.atol}
        options |= {"cache-dir": self.args.cache_dir}
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        app(["export", "onnx", *given, "--", self.args.model, self.args.output])


REGISTER_COMMANDS = [(VoCoLlamaOnnxExportCommand, ExportCommand)]
