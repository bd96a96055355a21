"""Images as LLaVA-OneVision reads them: tiles of a grid, shrunk to so many of them, and frames pooled to a quarter."""

from typing import Any

import torch
from transformers import LlavaOnevisionModel

from .configuration_voco_llama import VoCoLlamaConfig
from .tiles_voco_llama import TiledImages


class LlavaOnevisionImages(TiledImages):
    """The vision side of [`~transformers.LlavaOnevisionModel`]."""

    # Methods of the class itself: nothing of how it packs and pools is written down here
    get_image_features = LlavaOnevisionModel.get_image_features
    pack_image_features = LlavaOnevisionModel.pack_image_features
    get_video_features = LlavaOnevisionModel.get_video_features
    apply_pooling = LlavaOnevisionModel.apply_pooling

    @staticmethod
    def pack_options(config: VoCoLlamaConfig) -> dict[str, str]:
        return {"vision_aspect_ratio": config.vision_aspect_ratio}  # type: ignore[dict-item]  # set for this model

    def get_frame_features(self, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        """Tokens `(num_images, V, hidden_size)` of frames, each what a video of one frame is."""
        return self.get_video_features(pixel_values[:, None], return_dict=True, **options).pooler_output


__all__ = ["LlavaOnevisionImages"]
