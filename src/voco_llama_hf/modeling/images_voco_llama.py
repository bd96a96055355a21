"""Every road from an image to pixels: upright, in RGB, transparency on white, 16-bit greys scaled."""

import base64
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, Any

import numpy as np
import torch
from huggingface_hub.utils import httpx
from PIL import Image, ImageOps
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.utils import logging


logger = logging.get_logger(__name__)

MAX_PIXELS = 100_000_000
# An image processor scales the short side to hundreds of pixels first, and the long one with it
MAX_ASPECT_RATIO = 1000
MAX_DOWNLOAD_BYTES = 256 << 20
DOWNLOAD_SECONDS = 60.0
ORIENTATION = 0x0112  # the tag of EXIF


class TooLargeError(ValueError):
    """An image of more pixels than can be read."""


class NotAnImageError(ValueError):
    """A content that is no image in any format that Pillow reads."""


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


def load_images(images: ImageInput, timeout: float | None = None, upright: bool = False) -> list[Any]:
    """
    What transformers takes for images as one list.

    Args:
        images (`ImageInput`):
            Paths, URLs, base64 strings, PIL images, arrays and tensors; one of them, or lists of them.
        timeout (`float`, *optional*):
            Seconds that a server may take to answer; `DOWNLOAD_SECONDS` by default.
        upright (`bool`, *optional*, defaults to `False`):
            Whether PIL images are turned as their EXIF data says; files always are. transformers' pipelines turn
            them, its processors do not.

    Returns:
        `list`: PIL images in mode RGB; arrays and tensors as they were.

    Raises:
        ValueError: if one is no image, is damaged, cannot be downloaded or is too large.
    """
    flat: Any = make_flat_list_of_images(_load(images, timeout, upright))
    return list(flat)


def _load(images: Any, timeout: float | None, upright: bool) -> Any:
    if isinstance(images, (list, tuple)):
        return [_load(image, timeout, upright) for image in images]
    if isinstance(images, os.PathLike):
        return open_image(images)
    if isinstance(images, str):
        return _load_string(images, timeout)
    if isinstance(images, Image.Image):
        return to_rgb(ImageOps.exif_transpose(images) if upright else _warn_if_turned(images))
    return images


def _load_string(source: str, timeout: float | None) -> Image.Image:
    """A path, a URL or an image in base64, told apart as transformers does."""
    if source.startswith(("http://", "https://")):
        return decode_image(_download(source, timeout), source)
    if os.path.exists(source):
        return open_image(source)
    encoded = source.partition(",")[2] if source.startswith("data:image/") else source
    try:
        return decode_image(base64.decodebytes(encoded.encode()))
    except TooLargeError:
        raise
    except ValueError as error:
        if source is not encoded and not isinstance(error, NotAnImageError):
            raise ValueError(f"the image in a data URL cannot be read: {error}") from None
        shown = source if len(source) <= 200 else f"{source[:200]}..."
        raise ValueError(
            f"{shown} is not an image: expected a URL that starts with http:// or https://, the path of an image "
            f"file, or an image in base64 ({error})"
        ) from None


def _download(url: str, timeout: float | None) -> bytes:
    content = bytearray()
    try:
        with httpx.stream(
            "GET", url, timeout=DOWNLOAD_SECONDS if timeout is None else timeout, follow_redirects=True
        ) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_DOWNLOAD_BYTES:
                    raise TooLargeError(f"{url} is too large: at most {MAX_DOWNLOAD_BYTES >> 20} MB are downloaded")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{url} cannot be downloaded: {error}") from error
    return bytes(content)


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An image in mode RGB: transparency on white, 16-bit greys scaled to 8 bits.

    Args:
        image (`PIL.Image.Image`):
            An image in any mode; of an animation the current frame is taken.

    Raises:
        ValueError: if Pillow cannot turn its mode into RGB.
    """
    if image.mode.startswith("I"):
        return _scaled_grey(image)
    if image.mode == "F":
        warn_if_scaled([np.asarray(image)])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """Pillow cuts 16-bit greys off at 255 instead of scaling them, and knows nothing of their transparency."""
    values = np.asarray(image.convert("I"))
    grey = (values / 256).clip(0, 255).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def warn_if_scaled(images: list[Any]) -> None:
    """Warns of arrays and tensors between 0 and 1, which an image processor divides by 255 once more."""
    for image in images:
        array = image.numpy(force=True) if isinstance(image, torch.Tensor) else image
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
            continue
        if array.min() >= 0 and 0 < array.max() <= 1:
            logger.warning_once(
                "An image has floats between 0 and 1, which are taken for nearly black pixels: pass numbers from 0 to "
                "255, or do_rescale=False."
            )


def _warn_if_turned(image: Image.Image) -> Image.Image:
    # Only what is read already: another look at the file of an image may fail
    if image.getexif().get(ORIENTATION, 1) != 1:
        logger.warning_once(
            "An image is to be turned by its EXIF data, and is taken as it lies, as transformers' processors do: pass "
            "its path, or PIL.ImageOps.exif_transpose(image)."
        )
    return image


def _decoded(image: Image.Image, path: str | os.PathLike) -> Image.Image:
    try:
        return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise whatever they stumble over
        raise ValueError(f"{path} is damaged: {error}") from error


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # a name that is too long or has a null character
        raise FileNotFoundError(f"no such image: {path}") from None
    if stat.S_ISDIR(mode):
        raise ValueError(f"{path} is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is not an image: a pipe or a device")  # opening it may never end
    with _recognized(path, path, MAX_PIXELS) as image:
        yield image


@contextmanager
def _recognized(
    file: str | os.PathLike | IO[bytes], path: str | os.PathLike, max_pixels: int
) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd metadata; the bounds here are errors
        try:
            image = Image.open(file)
        except Image.UnidentifiedImageError:
            raise NotAnImageError(f"{path} is not an image") from None
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


__all__ = [
    "MAX_ASPECT_RATIO",
    "MAX_PIXELS",
    "NotAnImageError",
    "TooLargeError",
    "check_image",
    "decode_image",
    "load_images",
    "open_image",
    "to_rgb",
    "warn_if_scaled",
]
