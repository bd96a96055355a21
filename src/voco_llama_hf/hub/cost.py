"""What an image costs a model, compressed and not: positions, memory and floating point operations."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModel
from transformers.modeling_utils import set_zero3_state

from ..modeling import VoCoLlamaConfig
from ..modeling.configuration_voco_llama import cache_bytes, key_value_shape
from ..vision_tokens import count_largest_tiles, count_tile_tokens, count_vision_tokens


@dataclass(frozen=True)
class ImageCost:
    """
    What one image costs.

    Args:
        positions (`int`): Positions of the context window.
        nbytes (`int`): Bytes of the keys and values that are kept of it.
        image_flops (`int`): Floating point operations on the image, before the first question.
        question_flops (`int`): Floating point operations until the first token of an answer, with the image encoded.
    """

    positions: int
    nbytes: int
    image_flops: int
    question_flops: int


class CostModel:
    """
    Costs by counting: two operations a weight of every linear layer and token, and four a query, key and channel of
    attention. Nothing is run; the layers are those that the configuration makes, without their weights.

    Args:
        config ([`VoCoLlamaConfig`]):
            Configuration of a model whose text and vision towers are dense: a mixture of experts is counted with all.
    """

    def __init__(self, config: VoCoLlamaConfig):
        self.config: Any = config  # a VoCoLlamaConfig, whose parts are of whatever classes they name
        self.num_vision_tokens = count_vision_tokens(config)
        self.num_tiles = count_largest_tiles(config)
        # Under DeepSpeed's ZeRO-3 the weights of a new model would be shared out among the processes
        with set_zero3_state(), torch.device("meta"):
            model = AutoModel.from_config(config)
        self.num_parameters = model.num_parameters() + (0 if config.tie_word_embeddings else self.head_weights)
        self.text_weights = linear_weights(model.language_model)
        self.vision_weights = linear_weights(model.vision_tower.encoder)
        self.projector_weights = linear_weights(model.multi_modal_projector)

    @property
    def num_segment_tokens(self) -> int:
        """Prefix, vision and suffix tokens of an image."""
        config = self.config
        return len(config.vision_prefix_token_ids) + self.num_vision_tokens + len(config.vision_suffix_token_ids)

    def vision_flops(self) -> int:
        """Vision tower and projector, for one image of the most vision tokens."""
        vision = self.config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + (vision.model_type == "clip_vision_model")
        embedding = 2 * patches * vision.hidden_size * vision.num_channels * vision.patch_size**2
        attention = 4 * tokens**2 * vision.hidden_size * vision.num_hidden_layers
        projector = 2 * count_tile_tokens(self.config) * self.projector_weights
        return self.num_tiles * (embedding + 2 * tokens * self.vision_weights + attention + projector)

    def text_flops(self, num_tokens: int, num_cached: int = 0) -> int:
        """One pass of the language model over new tokens behind some that are cached, without its head."""
        text = self.config.text_config
        layers, _, head_dim = key_value_shape(text)
        attention = 4 * num_tokens * (num_cached + num_tokens) * text.num_attention_heads * head_dim * layers
        return 2 * num_tokens * self.text_weights + attention

    def nbytes(self, num_tokens: int) -> int:
        """Keys and values of tokens, in the data type of the checkpoint."""
        return cache_bytes(self.config, num_tokens, self.config.dtype or torch.float32)

    def compressed(self, num_voco_tokens: int, num_text_tokens: int) -> ImageCost:
        """An image that is compressed, and a question about it."""
        compression = self.vision_flops() + self.text_flops(self.num_segment_tokens + num_voco_tokens)
        return ImageCost(
            num_voco_tokens,
            self.nbytes(num_voco_tokens),
            compression,
            self.text_flops(num_text_tokens, num_cached=num_voco_tokens) + 2 * self.head_weights,
        )

    def uncompressed(self, num_text_tokens: int) -> ImageCost:
        """The same for all vision tokens, as a LLaVA reads them: every question runs over them again."""
        vision_tokens = self.num_vision_tokens
        return ImageCost(
            vision_tokens,
            self.nbytes(vision_tokens),
            self.vision_flops(),
            self.text_flops(vision_tokens + num_text_tokens) + 2 * self.head_weights,
        )

    @property
    def head_weights(self) -> int:
        """Weights that make the logits."""
        return self.config.text_config.hidden_size * self.config.text_config.vocab_size


def linear_weights(module: torch.nn.Module) -> int:
    """Weights of the linear layers of a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, torch.nn.Linear))


__all__ = ["CostModel", "ImageCost"]
