"""Which crops of a picture are learned, of what size, and how they are cut out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.folders import Picture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crop", "Size", "bucket_size", "cut", "has_one_crop", "plan_crops"]

# Sides of crops in pixels: of a square, or width and height.
Size = int | tuple[int, int]
COARSE = 64  # pixels: sides of buckets are multiples of it where pictures are large, as in other trainers


@dataclass(frozen=True)
class Crop:
    """A crop of a picture.

    Attributes:
        left, top: Its corner, in pixels of the picture after it was resized and mirrored.
        flipped: Whether the whole picture is mirrored first.
    """

    left: int
    top: int
    flipped: bool


def bucket_size(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """Choose the size that a picture is learned in: its aspect ratio as nearly as a bucket has it.

    Buckets have at most ``resolution²`` pixels, and sides that are multiples of ``step``, or of the next multiple of it
    from 64 on where ``resolution`` is 512 or more; no side is longer than twice the resolution.

    Args:
        width, height: Of the picture.
        resolution: Side of the square bucket.
        step: Of how many pixels each side must be a multiple.

    Returns:
        Width and height.

    Example:
        >>> bucket_size(1600, 900, 512, 16)
        (640, 384)
    """
    step = step * -(-COARSE // step) if resolution >= 512 else step
    sizes = [
        (across, min(resolution**2 // across, 2 * resolution) // step * step)
        for across in range(step, 2 * resolution + 1, step)
    ]
    aspect = math.log(width / height)
    upright = [(across, down) for across, down in sizes if down >= step]
    return min(
        (*upright, *((down, across) for across, down in upright)),
        key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]),
    )


def plan_crops(picture: Picture, size: Size, crop: str, count: int, flip: bool, seed: int) -> list[Crop]:
    """Choose the crops of a picture, once for the whole run.

    Args:
        picture: The picture.
        size: Of the crops, which the picture is resized to cover.
        crop: ``"center"`` or ``"random"``.
        count: The number of random crops.
        flip: Add each crop mirrored, too.
        seed: Of random crops; they follow from it and from the picture's content.

    Returns:
        The crops.
    """
    import random

    width, height = _resized(picture.width, picture.height, size)
    wide, high = _sides(size)
    across, down = width - wide, height - high
    if crop == "center" or across == down == 0:
        corners = [(across // 2, down // 2)]
    else:
        draw = random.Random(f"{seed} {picture.sha256}")
        corners = [(draw.randint(0, across), draw.randint(0, down)) for _ in range(count)]
    return [
        Crop(left, top, flipped) for left, top in corners for flipped in ((False, True) if flip else (False,))
    ]


def has_one_crop(picture: Picture, size: Size) -> bool:
    """Return whether a picture has no more than one crop of a size, being of its shape."""
    return _resized(picture.width, picture.height, size) == _sides(size)


def _sides(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resized(width: int, height: int, size: Size) -> tuple[int, int]:
    """Return the smallest size of a picture that covers a crop."""
    wide, high = _sides(size)
    if wide * height >= high * width:
        return wide, round(height * wide / width)
    return round(width * high / height), high


def cut(image: Any, size: Size, crop: Crop) -> Tensor:
    """Cut a crop out of a picture.

    Args:
        image: A PIL image, RGB.
        size: Of the crop.
        crop: Which crop.

    Returns:
        Its pixels from -1 to 1, ``(3, height, width)``.
    """
    import numpy
    import torch
    from PIL import Image, ImageOps

    wide, high = _sides(size)
    image = image.resize(_resized(image.width, image.height, size), Image.Resampling.LANCZOS)
    if crop.flipped:
        image = ImageOps.mirror(image)
    box = (crop.left, crop.top, crop.left + wide, crop.top + high)
    values = torch.from_numpy(numpy.asarray(image.crop(box)).copy())  # (height, width, 3)
    return values.permute(2, 0, 1).float() / 127.5 - 1
