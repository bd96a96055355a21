"""
The graphs that are exported: images to keys and values of VoCo tokens, and text behind them to logits. Where images
are divided into tiles there is one more in front, from tiles to their vision tokens, which transformers then packs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch.export import Dim
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.exporters import OnnxConfig, OnnxExporter

from ..modeling import VoCoLlamaForConditionalGeneration
from ..modeling.configuration_voco_llama import key_value_shape
from ..modeling.two_stages_voco_llama import compress_segments


KeyValues = list[tuple[torch.Tensor, torch.Tensor]]

VISION, COMPRESSOR, DECODER = "vision model", "compressor", "decoder"
BATCH, IMAGES, VOCO, SEQUENCE, PAST = "batch_size", "num_images", "num_voco_tokens", "sequence_length", "past_length"
TILES, VISION_TOKENS = "num_tiles", "num_vision_tokens"
FEATURES, NEWLINE = "image_features", "image_newline"


class Compressor(torch.nn.Module):
    """Images to the keys and values of their VoCo tokens, at positions 0..k-1."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor, voco_tokens: torch.Tensor) -> KeyValues:
        # The number of VoCo tokens is a length here, which the exporter keeps dynamic; see `_take_number`
        kept, _ = self.model.run_segments(pixel_values, voco_tokens.shape[0])
        return list(zip(kept.keys, kept.values))


class VisionModel(torch.nn.Module):
    """Tiles to their vision tokens, and the newline that ends a row of them."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        super().__init__()
        self.model: Any = model.model  # one that divides images

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # One more dimension, as a parameter itself cannot be what a graph returns
        return self.model.get_tile_features(pixel_values), self.model.image_newline[None]


class FeatureCompressor(torch.nn.Module):
    """Vision tokens of images of one length to the keys and values of their VoCo tokens."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        super().__init__()
        self.model = model.model

    def forward(self, image_features: torch.Tensor, voco_tokens: torch.Tensor) -> KeyValues:
        kept, _ = compress_segments(self.model, image_features, voco_tokens.shape[0])
        return list(zip(kept.keys, kept.values))


class Decoder(torch.nn.Module):
    """Text behind past keys and values, from wherever they are: images, text or both."""

    def __init__(self, model: VoCoLlamaForConditionalGeneration):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: KeyValues,
    ) -> tuple[torch.Tensor, KeyValues]:
        cache: Any = DynamicCache()
        for keys, values in past_key_values:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        hidden_states = self.language_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.lm_head(hidden_states), [(layer.keys, layer.values) for layer in cache.layers]


@dataclass
class Graph:
    """
    A module with what its export needs.

    Args:
        sample (`Callable`):
            Random inputs for given sizes of the dynamic axes: the keyword arguments of the module.
        inputs, outputs (`dict[str, tuple[str | None, ...]]`):
            Names of the inputs and outputs in order, as Optimum names them, and of their axes: None where the size is
            fixed.
    """

    name: str
    module: Any  # a torch.nn.Module, where the exporter's annotation asks for a whole model
    sample: Callable[[dict[str, int]], dict]
    inputs: dict[str, tuple[str | None, ...]]
    outputs: dict[str, tuple[str | None, ...]]


def build_graphs(model: VoCoLlamaForConditionalGeneration) -> list[Graph]:
    """The graphs of a model, in its dtype and on its device."""
    text, vision = model.config.text_config, model.config.vision_config
    num_layers, heads, head_dim = key_value_shape(text)
    presents = [f"present.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    pasts = [f"past_key_values.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]
    like: dict[str, Any] = {"dtype": model.dtype, "device": model.device}

    is_tiled = model.config.base_model_type != "llava"
    compressor = FeatureCompressor(model) if is_tiled else Compressor(model)
    side = vision.image_size

    def vision_sample(sizes: dict[str, int]) -> dict:
        return {"pixel_values": torch.randn(sizes[TILES], 3, side, side, **like)}

    def compressor_sample(sizes: dict[str, int]) -> dict:
        if is_tiled:
            shape = sizes[IMAGES], sizes.get(VISION_TOKENS, 3), text.hidden_size
            images = {FEATURES: torch.randn(shape, **like) * text.initializer_range}
        else:
            images = {"pixel_values": torch.randn(sizes[IMAGES], 3, side, side, **like)}
        return {**images, "voco_tokens": torch.zeros(sizes[VOCO], dtype=torch.long, device=model.device)}

    def decoder_sample(sizes: dict[str, int]) -> dict:
        batch, length, past = sizes[BATCH], sizes[SEQUENCE], sizes[PAST]
        # Rows of a batch are padded on the left, as `generate` has them
        padding = torch.arange(batch).clamp(max=past // 2)
        mask = (torch.arange(past + length) >= padding[:, None]).long().to(model.device)
        if past > 0:
            # Keys and values that the model computes itself, whose sizes differ by layer as no random numbers do
            images = compressor_sample({IMAGES: batch, VOCO: past})
            key_values = compressor(**images)
        else:
            empty = torch.empty(batch, heads, 0, head_dim, **like)
            key_values = [(empty, empty)] * num_layers
        return {
            "input_ids": torch.randint(text.vocab_size, (batch, length), device=model.device),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, past:],
            "past_key_values": key_values,
        }

    total = f"{PAST} + {SEQUENCE}"
    in_front = Graph(
        VISION,
        VisionModel(model),
        vision_sample,
        {"pixel_values": (TILES, None, None, None)},
        {FEATURES: (TILES, None, None), NEWLINE: (None, None)},
    )
    images: dict[str, tuple[str | None, ...]] = {"pixel_values": (IMAGES, None, None, None)}
    if is_tiled:
        images = {FEATURES: (IMAGES, VISION_TOKENS, None)}
    return [
        *([in_front] if is_tiled else []),
        Graph(
            COMPRESSOR,
            compressor,
            compressor_sample,
            {**images, VOCO: (VOCO,)},
            dict.fromkeys(presents, (IMAGES, None, VOCO, None)),
        ),
        Graph(
            DECODER,
            Decoder(model),
            decoder_sample,
            {
                "input_ids": (BATCH, SEQUENCE),
                "attention_mask": (BATCH, total),
                "position_ids": (BATCH, SEQUENCE),
                **dict.fromkeys(pasts, (BATCH, None, PAST, None)),
            },
            {"logits": (BATCH, SEQUENCE, None), **dict.fromkeys(presents, (BATCH, None, total, None))},
        ),
    ]


EXPORT_SIZES = {TILES: 3, VISION_TOKENS: 6, IMAGES: 2, VOCO: 3, BATCH: 2, SEQUENCE: 4, PAST: 5}


@torch.no_grad()
def export_graph(graph: Graph, config: OnnxConfig) -> onnx_ir.Model:
    """
    One graph as ONNX, through [`~transformers.exporters.OnnxExporter`].

    Args:
        config ([`~transformers.exporters.OnnxConfig`]): Opset, fusions and quantizer; the dynamic axes are set here.
    """
    sample = graph.sample(EXPORT_SIZES)
    axes = iter(graph.inputs.values())
    config.dynamic_shapes = torch.utils._pytree.tree_map(
        lambda _: {i: Dim.DYNAMIC if name == PAST else Dim.AUTO for i, name in enumerate(next(axes)) if name}, sample
    )
    program, _ = OnnxExporter().export_program(graph.module, sample, config)
    # The exporter leaves stack traces of this machine in every node
    ClearMetadataAndDocStringPass()(program)
    _widen_angles(program.graph)
    _name_values(program.graph, graph)
    if graph.name == COMPRESSOR:
        _take_number(program.graph)
    return program


def _name_values(program: onnx_ir.Graph, graph: Graph) -> None:
    """Inputs, outputs and their axes by the names that other ONNX tools recognise."""
    names: dict[str, str] = {}
    values = [*program.inputs, *program.outputs]
    for value, (name, axes) in zip(values, [*graph.inputs.items(), *graph.outputs.items()], strict=True):
        value.name = name
        shape: Any = value.shape
        for size, axis in zip(shape, axes, strict=True):
            if axis is not None and isinstance(size, int):
                raise ValueError(f"the {graph.name} cannot be exported: {axis} of {name} turned out fixed at {size}")
            names |= {} if axis is None else {str(size): axis}
    for value in [*program.inputs, *(value for node in program.all_nodes() for value in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([names.get(str(size), size) for size in value.shape])


def _widen_angles(graph: onnx_ir.Graph) -> None:
    """
    Repeats angles for every row: ONNX's own operator of rotary embeddings (opset 23) does not broadcast as PyTorch.
    """
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain != "":
            continue
        batch = onnx_ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1})
        ones = onnx_ir.node("Constant", [], {"value_ints": [1, 1]})
        shape = onnx_ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
        wide = [onnx_ir.node("Expand", [node.inputs[i], shape.outputs[0]]) for i in (1, 2)]
        graph.insert_before(node, [batch, ones, shape, *wide])
        for i, expanded in enumerate(wide, start=1):
            node.replace_input_with(i, expanded.outputs[0])


def _take_number(graph: onnx_ir.Graph) -> None:
    """Replaces the input whose length is the number of VoCo tokens by that number, a scalar."""
    by_length = graph.inputs[1]
    number = onnx_ir.Value(name=VOCO, shape=onnx_ir.Shape([]), type=onnx_ir.TensorType(onnx_ir.DataType.INT64))
    axes = onnx_ir.node("Constant", [], {"value_ints": [0]})
    shape = onnx_ir.node("Unsqueeze", [number, axes.outputs[0]])
    tokens = onnx_ir.node("ConstantOfShape", shape.outputs, {"value": onnx_ir.tensor([0])})
    by_length.replace_all_uses_with(tokens.outputs[0])
    graph.insert_before(graph[0], [axes, shape, tokens])
    graph.inputs[1] = number
