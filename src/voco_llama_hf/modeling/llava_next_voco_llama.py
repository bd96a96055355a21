"""Images as LLaVA-NeXT (LLaVA-1.6) reads them: tiles of a grid, unpadded, each row ended by a learned newline."""

from transformers import LlavaNextModel

from .configuration_voco_llama import VoCoLlamaConfig
from .tiles_voco_llama import TiledImages


class LlavaNextImages(TiledImages):
    """The vision side of [`~transformers.LlavaNextModel`]. A frame of a video is an image of one tile."""

    # Methods of the class itself: nothing of how it packs is written down here
    get_image_features = LlavaNextModel.get_image_features
    pack_image_features = LlavaNextModel.pack_image_features

    @staticmethod
    def pack_options(config: VoCoLlamaConfig) -> dict[str, str]:
        return {"vision_feature_select_strategy": config.vision_feature_select_strategy}


__all__ = ["LlavaNextImages"]
