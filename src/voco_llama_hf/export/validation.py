"""Exported graphs against PyTorch, on random inputs of several shapes."""

from dataclasses import dataclass

import torch

from .graphs import BATCH, COMPRESSOR, IMAGES, PAST, SEQUENCE, VOCO, Graph
from .session import TorchSession


# How far a graph may be from PyTorch in the same precision, as a part of the size of what PyTorch computes
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": 3e-1, "int4": 5e-1}
SIZES = {
    COMPRESSOR: [{IMAGES: 1, VOCO: 1}, {IMAGES: 1, VOCO: 8}, {IMAGES: 3, VOCO: 2}],
    "decoder": [
        {BATCH: 1, SEQUENCE: 7, PAST: 0},
        {BATCH: 1, SEQUENCE: 1, PAST: 12},
        {BATCH: 3, SEQUENCE: 1, PAST: 5},
        {BATCH: 4, SEQUENCE: 9, PAST: 4},
    ],
}


@dataclass
class Difference:
    """
    A graph against PyTorch for one set of sizes.

    Args:
        graph (`str`): Name of the graph.
        sizes (`dict[str, int]`): Sizes of the dynamic axes.
        absolute (`float`): Largest difference of all outputs.
        relative (`float`): Norm of the difference of an output by the norm of that output, for the worst output.
        tolerance (`float`): What `relative` may be; in fp32 `absolute` too.
        output (`str`): The worst output.
    """

    graph: str
    sizes: dict[str, int]
    absolute: float
    relative: float
    tolerance: float
    output: str
    checks_absolute: bool

    @property
    def is_fine(self) -> bool:
        # Written so that a NaN is not fine
        return self.relative <= self.tolerance and (not self.checks_absolute or self.absolute <= self.tolerance)


@torch.no_grad()
def compare(graph: Graph, session: TorchSession, kind: str) -> list[Difference]:
    """
    Runs a graph and its module on the same inputs.

    Args:
        kind (`str`): Precision or quantization of the graph, which says what it may differ.
    """
    differences = []
    for sizes in SIZES[graph.name]:
        sample = graph.sample(sizes)
        expected = dict(zip(graph.outputs, torch.utils._pytree.tree_leaves(graph.module(**sample))))
        inputs = dict(zip(graph.inputs, torch.utils._pytree.tree_leaves(sample)))
        if graph.name == COMPRESSOR:
            inputs[VOCO] = torch.tensor(sizes[VOCO])
        try:
            outputs = session.run(inputs, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        except Exception as error:  # ONNX Runtime's own errors share no class
            raise ValueError(f"the {graph.name} fails at {describe(sizes)}: {' '.join(str(error).split())}") from error
        relative, absolute = {}, []
        for name, tensor in expected.items():
            deviation = outputs[name].to(tensor.device).float() - tensor.float()
            relative[name] = float(deviation.norm() / tensor.float().norm())
            absolute.append(deviation.abs().max())
        # A NaN is the worst of all
        worst = max(relative, key=lambda name: float("inf") if relative[name] != relative[name] else relative[name])
        differences.append(
            Difference(
                graph.name,
                sizes,
                float(torch.stack(absolute).max()),
                relative[worst],
                TOLERANCES[kind],
                worst,
                checks_absolute=kind == "fp32",
            )
        )
    return differences


def check_differences(differences: list[Difference]) -> None:
    """
    Raises:
        ValueError: if a graph differs beyond tolerance; the message says where.
    """
    bad = [difference for difference in differences if not difference.is_fine]
    if bad:
        worst = bad[0]
        raise ValueError(
            f"{len(bad)} of {len(differences)} runs differ from PyTorch beyond tolerance, first the {worst.graph} at "
            f"{describe(worst.sizes)}: {worst.output} by {worst.relative:.1e} of its size (at most "
            f"{worst.absolute:.1e}), allowed is {worst.tolerance:.0e}"
        )


def describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
