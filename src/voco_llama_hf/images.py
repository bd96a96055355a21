"""Opening of image files, as the processor opens them."""

from .modeling.images_voco_llama import (
    MAX_ASPECT_RATIO,
    MAX_PIXELS,
    TooLargeError,
    check_image,
    decode_image,
    open_image,
)


__all__ = ["MAX_ASPECT_RATIO", "MAX_PIXELS", "TooLargeError", "check_image", "decode_image", "open_image"]
