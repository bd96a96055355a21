"""Images of several tiles on ONNX Runtime: the graph makes tokens of tiles, and transformers packs them."""

import copy
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling import VoCoLlamaConfig, VoCoLlamaModel
from .session import TorchSession


class ExportedTower(torch.nn.Module):
    """
    The graph of vision tower and projector in place of a vision tower.

    Args:
        session ([`TorchSession`]): The graph.
        config ([`VoCoLlamaConfig`]): Configuration of the model that was exported.
    """

    def __init__(self, session: TorchSession, config: Any):  # a VoCoLlamaConfig, whose parts are of any class
        super().__init__()
        self.session = session
        vision = config.vision_config
        class_token = config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
        self.num_tokens = (vision.image_size // vision.patch_size) ** 2 + class_token
        dtype, _ = session.output_types["image_features"]
        self.newline = torch.nn.Parameter(
            torch.empty(config.text_config.hidden_size, dtype=dtype, device=session.device), requires_grad=False
        )

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Vision tokens of tiles as the only hidden states."""
        width = len(self.newline)
        shapes = {"image_features": (len(pixel_values), self.num_tokens, width), "image_newline": (1, width)}
        outputs = self.session.run({"pixel_values": pixel_values}, shapes)
        self.newline.copy_(outputs["image_newline"][0])
        return BaseModelOutputWithPooling(hidden_states=(outputs["image_features"],))  # type: ignore[arg-type]


def build_vision_side(session: TorchSession, config: VoCoLlamaConfig) -> VoCoLlamaModel:
    """
    A model whose `get_vision_features` runs the graph, and all else of it as PyTorch does: it has no text model.

    Raises:
        ValueError: if the graph has other inputs or outputs than one of vision tower and projector.
    """
    if set(session.input_types) != {"pixel_values"} or set(session.output_types) != {
        "image_features",
        "image_newline",
    }:
        raise ValueError("the vision model is not a graph of this package: it has other inputs or outputs")
    shaped = copy.deepcopy(config)
    # What the graph returns is chosen and projected already
    shaped.vision_feature_layer, shaped.vision_feature_select_strategy = 0, "full"
    with torch.device("meta"):
        model: Any = VoCoLlamaModel(shaped)
    del model.language_model
    model.vision_tower = ExportedTower(session, config)
    model.multi_modal_projector = torch.nn.Identity()
    model.image_newline = model.vision_tower.newline
    return model


__all__ = ["build_vision_side"]
