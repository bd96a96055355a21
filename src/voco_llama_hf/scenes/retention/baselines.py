"""Other ways to make one or a few tokens of an image: modules that take the place of LLaVA's projector."""

from __future__ import annotations

import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel


class AveragePooling(torch.nn.Module):
    """
    The mean of all projected vision tokens, through a linear layer.

    Args:
        projector (`torch.nn.Module`): LLaVA's projector.
        hidden_size (`int`): Hidden size of the text model.
    """

    def __init__(self, projector: torch.nn.Module, hidden_size: int):
        super().__init__()
        self.projector = projector
        self.linear = torch.nn.Linear(hidden_size, hidden_size)
        # The text model knows projected vision tokens: their mean is where the training starts
        torch.nn.init.eye_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, V, vision_hidden_size)` to `(num_images, 1, hidden_size)`."""
        return self.linear(self.projector(image_features).mean(1, keepdim=True))


class QFormer(torch.nn.Module):
    """
    BLIP-2's Q-Former: learned queries that look at each other and at the vision tokens.

    Args:
        projector (`torch.nn.Module`): LLaVA's projector, whose tokens the queries look at.
        hidden_size (`int`): Hidden size of the text model.
        num_queries (`int`): Number of queries: the tokens an image becomes.
        num_layers (`int`, *optional*, defaults to 2): Number of layers.
    """

    def __init__(self, projector: torch.nn.Module, hidden_size: int, num_queries: int, num_layers: int = 2):
        super().__init__()
        self.projector = projector
        config = Blip2QFormerConfig(
            hidden_size=hidden_size,
            encoder_hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=hidden_size // 64,
            cross_attention_frequency=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.queries = torch.nn.Parameter(torch.randn(1, num_queries, hidden_size) * config.initializer_range)
        self.qformer = Blip2QFormerModel(config)
        self.linear = torch.nn.Linear(hidden_size, hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, V, vision_hidden_size)` to `(num_images, num_queries, hidden_size)`."""
        vision = self.projector(image_features)
        queries = self.queries.expand(len(vision), -1, -1)
        return self.linear(self.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state)


def put_compressor(model: PreTrainedModel, compressor: str, num_tokens: int) -> None:
    """
    Puts a compressor behind the vision tower of a model: what it reads uncompressed from then on are `num_tokens`
    tokens an image.

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Changed in place.
        compressor (`str`): `"average pooling"` or `"q-former"`.
        num_tokens (`int`): Tokens of an image; average pooling makes one.
    """
    projector, hidden_size = model.model.multi_modal_projector, model.config.text_config.hidden_size
    if compressor == "average pooling":
        model.model.multi_modal_projector = AveragePooling(projector, hidden_size)
    else:
        model.model.multi_modal_projector = QFormer(projector, hidden_size, num_tokens)
