"""What the placeholders of a text stand for."""


def group_cached(
    kinds: list[str], num_cached: int, num_frames: int | list[int] | None, num_tiles: int | list[int] | None
) -> list[int]:
    """
    How many compressed images each placeholder stands for.

    Args:
        kinds (`list[str]`):
            `"image"` or `"video"`, one a placeholder.
        num_cached (`int`):
            Compressed images.
        num_frames (`int` or `list[int]`, *optional*):
            Frames of every video, or of each. By default what no image stands for is divided evenly.
        num_tiles (`int` or `list[int]`, *optional*):
            Compressed images that every image, or each, stands for; one by default.

    Raises:
        ValueError: if the numbers do not fit.
    """
    num_images, num_videos = kinds.count("image"), kinds.count("video")
    tiles = per_placeholder(1 if num_tiles is None else num_tiles, num_images, "image", "num_tiles")
    total = num_cached - sum(tiles)
    if num_videos == 0 and total != 0:
        in_tiles = "" if num_tiles is None else f" of {tiles} tiles"
        raise ValueError(
            f"the text has {num_images} <image> tokens{in_tiles}, but the voco_cache has {num_cached} images"
        )
    if num_frames is None:
        num_frames = max(total, 0) // max(num_videos, 1)
    frames = [num_frames] * num_videos if isinstance(num_frames, int) else list(num_frames)
    if num_videos and (len(frames) != num_videos or sum(frames) != total or min(frames) < 1):
        raise ValueError(
            f"{num_videos} <video> tokens of {frames} frames and {num_images} <image> "
            f"tokens do not fit a voco_cache of {num_cached} images: pass num_frames, one number a video"
        )
    films, stills = iter(frames), iter(tiles)
    return [next(stills) if kind == "image" else next(films) for kind in kinds]


def per_placeholder(numbers: int | list[int], num_placeholders: int, kind: str, name: str) -> list[int]:
    """
    One number a placeholder from one number or from one a placeholder.

    Raises:
        ValueError: if there are more or fewer, or one is below 1.
    """
    found = [numbers] * num_placeholders if isinstance(numbers, int) else list(numbers)
    if len(found) != num_placeholders or min(found, default=1) < 1:
        raise ValueError(
            f"{name} must be one number of at least 1 for each of {num_placeholders} {kind}s, got {found}"
        )
    return found


__all__ = ["group_cached"]
