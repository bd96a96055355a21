"""Opening of image files: what Pillow reads, upright and in RGB, or a one-line error."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps


MAX_PIXELS = 100_000_000
# An image processor scales the short side to hundreds of pixels first, and the long one with it
MAX_ASPECT_RATIO = 1000


class TooLargeError(ValueError):
    """An image of more pixels than can be read."""


def check_image(path: str | os.PathLike) -> None:
    """
    Looks at the header of an image file without decoding it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, or exceeds `MAX_PIXELS` or `MAX_ASPECT_RATIO`.
    """
    with _opened(path):
        pass


def open_image(path: str | os.PathLike) -> Image.Image:
    """
    Opens an image as a person sees it: turned as its EXIF data says, transparency on white, 16-bit greys scaled.

    Args:
        path (`str` or `os.PathLike`):
            File in any format that Pillow reads. Of an animation the first frame is taken.

    Returns:
        `PIL.Image.Image` in mode RGB.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not an image, is damaged, or exceeds `MAX_PIXELS` or `MAX_ASPECT_RATIO`.
    """
    with _opened(path) as image:
        return _decoded(image, path)


def decode_image(content: bytes, name: str = "the image", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """
    The same for the content of a file.

    Args:
        content (`bytes`):
            What the file holds.
        name (`str`, *optional*, defaults to `"the image"`):
            What errors call it.
        max_pixels (`int`, *optional*):
            Pixels that it may have.

    Raises:
        TooLargeError: if it exceeds `max_pixels`; it is a `ValueError`.
        ValueError: if it is not an image, is damaged, or exceeds `MAX_ASPECT_RATIO`.
    """
    with _recognized(BytesIO(content), name, max_pixels) as image:
        return _decoded(image, name)


def _decoded(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever they stumble over
        raise ValueError(f"{path} is damaged: {error}") from error


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    # os.path takes any string for a path, pathlib raises for very long ones
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, not an image")
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such image: {path}")
    with _recognized(path, path, MAX_PIXELS) as image:
        yield image


@contextmanager
def _recognized(file: Any, path: str | os.PathLike, max_pixels: int) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; the bounds here are errors
        try:
            image = Image.open(file)
        except Image.UnidentifiedImageError:
            raise ValueError(f"{path} is not an image") from None
        except Image.DecompressionBombError:
            raise TooLargeError(f"{path} is too large: at most {max_pixels:,} pixels can be read") from None
        except Exception as error:  # as above
            raise ValueError(f"{path} cannot be read: {error}") from error
        with image:
            _check_size(path, *image.size, max_pixels)
            yield image


def _check_size(path: str | os.PathLike, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLargeError(f"{path} is too large: {width}x{height}, at most {max_pixels:,} pixels can be read")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(
            f"{path} is too narrow: {width}x{height}, one side can be at most {MAX_ASPECT_RATIO:,} times the other"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow cuts 16-bit greys off at 255 instead of scaling them
        return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


__all__ = ["MAX_ASPECT_RATIO", "MAX_PIXELS", "TooLargeError", "check_image", "decode_image", "open_image"]
