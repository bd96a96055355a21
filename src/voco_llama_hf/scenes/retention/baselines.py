"""Other ways to make one or a few tokens of an image: modules that take the place of LLaVA's projector."""

from __future__ import annotations

import torch
from torch.nn.functional import adaptive_avg_pool2d
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedModel


class AveragePooling(torch.nn.Module):
    """
    Means of projected vision tokens, of all or of equal parts of the picture, through a linear layer.

    Args:
        projector (`torch.nn.Module`): LLaVA's projector.
        hidden_size (`int`): Hidden size of the text model.
        num_tokens (`int`, *optional*, defaults to 1): Number of parts: the tokens an image becomes.
    """

    def __init__(self, projector: torch.nn.Module, hidden_size: int, num_tokens: int = 1):
        super().__init__()
        self.projector = projector
        rows = next(rows for rows in range(int(num_tokens**0.5), 0, -1) if num_tokens % rows == 0)
        self.parts = rows, num_tokens // rows
        self.linear = torch.nn.Linear(hidden_size, hidden_size)
        # The text model knows projected vision tokens: their mean is where the training starts
        torch.nn.init.eye_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """`(num_images, V, vision_hidden_size)` to `(num_images, num_tokens, hidden_size)`."""
        vision = self.projector(image_features)
        side = round(vision.shape[1] ** 0.5)
        grid = vision.transpose(1, 2).unflatten(2, (side, side))
        return self.linear(adaptive_avg_pool2d(grid, self.parts).flatten(2).transpose(1, 2))


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


class TwoTokens(torch.nn.Module):
    """
    LLaMA-VID's two tokens of a frame: a context token, what the question finds in the frame, and a content token, the
    mean of the frame (Li et al., 2024). The question is read from the text model's own embeddings.

    Args:
        projector (`torch.nn.Module`): LLaVA's projector, whose tokens are looked at.
        hidden_size (`int`): Hidden size of the text model.
    """

    def __init__(self, projector: torch.nn.Module, hidden_size: int):
        super().__init__()
        self.projector = projector
        self.query = torch.nn.Linear(hidden_size, hidden_size)
        self.context = torch.nn.Linear(hidden_size, hidden_size)
        self.content = AveragePooling(torch.nn.Identity(), hidden_size)
        torch.nn.init.eye_(self.context.weight)
        torch.nn.init.zeros_(self.context.bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """All vision tokens, projected: the question is not known here."""
        return self.projector(image_features)

    def reduce(self, vision: torch.Tensor, question: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Args:
            vision (`torch.Tensor` of shape `(num_questions, num_frames, V, hidden_size)`): Projected vision tokens.
            question (`torch.Tensor` of shape `(num_questions, length, hidden_size)`): Embeddings of the questions.
            mask (`torch.Tensor` of shape `(num_questions, length)`): Which of them are no padding.

        Returns:
            `torch.Tensor` of shape `(num_questions, num_frames, 2, hidden_size)`.
        """
        scores = self.query(question)[:, None] @ vision.transpose(2, 3) / vision.shape[-1] ** 0.5
        found = scores.softmax(-1) @ vision
        weights = mask[:, None, :, None].to(found)
        context = self.context((found * weights).sum(2) / weights.sum(2).clamp(min=1))
        content = self.content(vision.flatten(0, 1)).view_as(context)
        return torch.stack([context, content], dim=2)


def put_compressor(model: PreTrainedModel, compressor: str, num_tokens: int) -> None:
    """
    Puts a compressor behind the vision tower of a model: what it reads uncompressed from then on are `num_tokens`
    tokens an image; of `"llama-vid"` two a frame, see [`LlamaVid`].

    Args:
        model ([`VoCoLlamaForConditionalGeneration`]): Changed in place.
        compressor (`str`): `"average pooling"`, `"q-former"` or `"llama-vid"`.
        num_tokens (`int`): Tokens of an image.
    """
    projector, hidden_size = model.model.multi_modal_projector, model.config.text_config.hidden_size
    if compressor == "average pooling":
        model.model.multi_modal_projector = AveragePooling(projector, hidden_size, num_tokens)
    elif compressor == "q-former":
        model.model.multi_modal_projector = QFormer(projector, hidden_size, num_tokens)
    else:
        model.model.multi_modal_projector = TwoTokens(projector, hidden_size)
