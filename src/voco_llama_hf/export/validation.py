"""Exported graphs against PyTorch, one by one, at several sizes of their inputs; the same inputs every time."""

import math
from dataclasses import dataclass

import torch

from .graphs import BATCH, COMPRESSOR, IMAGES, PAST, SEQUENCE, TILES, VISION, VISION_TOKENS, VOCO, Graph
from .session import TorchSession


# How far a graph may be from PyTorch in the same precision, as a part of the size of what PyTorch computes. Quantized
# graphs differ by what their weights lose; their answers are judged instead
TOLERANCES: dict[str, float | None] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1, "int8": None, "int4": None}
ABSOLUTE_TOLERANCES = {"fp32": 1e-3}
SIZES = {
    VISION: [{TILES: 1}, {TILES: 5}],
    COMPRESSOR: [
        {IMAGES: 1, VOCO: 1, VISION_TOKENS: 4},
        {IMAGES: 1, VOCO: 8, VISION_TOKENS: 29},
        {IMAGES: 3, VOCO: 2, VISION_TOKENS: 1},
    ],
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
        relative (`float`):
            Norm of the difference of an output by the norm of that output, for the worst output; by the number of
            values where PyTorch computes zeros.
        output (`str`): The worst output.
        rtol (`float`, *optional*): What `relative` may be; None for any number.
        atol (`float`, *optional*): What `absolute` may be; None for any number.
    """

    graph: str
    sizes: dict[str, int]
    absolute: float
    relative: float
    output: str
    rtol: float | None
    atol: float | None

    @property
    def is_fine(self) -> bool:
        # Written so that a NaN is not fine
        return math.isfinite(self.relative) and all(
            limit is None or value <= limit
            for value, limit in ((self.relative, self.rtol), (self.absolute, self.atol))
        )


@torch.no_grad()
def compare(graph: Graph, session: TorchSession, kind: str, atol: float | None = None) -> list[Difference]:
    """
    Runs a graph and its module on the same inputs.

    Args:
        kind (`str`): Precision or quantization of the graph, which says what it may differ.
        atol (`float`, *optional*): What it may differ at most; by default it depends on `kind`.

    Raises:
        ValueError: if the graph does not run, or PyTorch itself computes a NaN.
    """
    differences = []
    for sizes in SIZES[graph.name]:
        sample = seeded_sample(graph, sizes)
        expected = dict(zip(graph.outputs, torch.utils._pytree.tree_leaves(graph.module(**sample))))
        inputs = dict(zip(graph.inputs, torch.utils._pytree.tree_leaves(sample)))
        if graph.name == COMPRESSOR:
            inputs[VOCO] = torch.tensor(sizes[VOCO])
        try:
            outputs = session.run(inputs, {name: tuple(tensor.shape) for name, tensor in expected.items()})
        except Exception as error:  # ONNX Runtime's own errors share no class
            raise ValueError(f"the {graph.name} fails at {describe(sizes)}: {' '.join(str(error).split())}") from error
        for name, tensor in expected.items():
            if not tensor.isfinite().all():
                raise ValueError(
                    f"PyTorch itself computes {name} of the {graph.name} at {describe(sizes)} as NaN or infinite in "
                    f"{tensor.dtype}: export in another precision"
                )
        relative = {name: relative_difference(outputs[name], tensor) for name, tensor in expected.items()}
        absolute = [
            (outputs[name].to(tensor.device).float() - tensor.float()).abs().max() for name, tensor in expected.items()
        ]
        # A NaN is the worst of all
        worst = max(relative, key=lambda name: math.inf if math.isnan(relative[name]) else relative[name])
        differences.append(
            Difference(
                *(graph.name, sizes, float(torch.stack(absolute).max())),
                *(relative[worst], worst, TOLERANCES[kind]),
                atol=ABSOLUTE_TOLERANCES.get(kind) if atol is None else atol,
            )
        )
    return differences


def seeded_sample(graph: Graph, sizes: dict[str, int]) -> dict:
    """Inputs of a graph, the same in every run, without a trace in the caller's random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return graph.sample(sizes)


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected; where that is zero, by that of as many ones."""
    deviation = (output.to(expected.device).float() - expected.float()).norm()
    return float(deviation) / (float(expected.float().norm()) or math.sqrt(max(1, expected.numel())))


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
            f"{worst.absolute:.1e}), allowed is {describe_limits(worst)}"
        )


def describe(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())


def describe_limits(difference: Difference) -> str:
    limits = ((difference.rtol, " of its size"), (difference.atol, " at most"))
    return " and ".join(f"{limit:.0e}{what}" for limit, what in limits if limit is not None) or "any number"
