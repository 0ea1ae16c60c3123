"""Which square crops of a picture are learned, and how they are cut out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moslora.tasks.image.folders import Picture

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crop", "cut", "is_square", "plan_crops"]


@dataclass(frozen=True)
class Crop:
    """A square crop of a picture.

    Attributes:
        left, top: Its corner, in pixels of the picture after it was resized and mirrored.
        flipped: Whether the whole picture is mirrored first.
    """

    left: int
    top: int
    flipped: bool


def plan_crops(picture: Picture, resolution: int, crop: str, count: int, flip: bool, seed: int) -> list[Crop]:
    """Choose the crops of a picture, once for the whole run.

    Args:
        picture: The picture.
        resolution: The crop's side in pixels, to which the picture's shorter side is resized.
        crop: ``"center"`` or ``"random"``.
        count: The number of random crops.
        flip: Add each crop mirrored, too.
        seed: Of random crops; they follow from it and from the picture's content.

    Returns:
        The crops.
    """
    import random

    width, height = _resized(picture.width, picture.height, resolution)
    across, down = width - resolution, height - resolution
    if crop == "center" or across == down == 0:
        corners = [(across // 2, down // 2)]
    else:
        draw = random.Random(f"{seed} {picture.sha256}")
        corners = [(draw.randint(0, across), draw.randint(0, down)) for _ in range(count)]
    return [
        Crop(left, top, flipped) for left, top in corners for flipped in ((False, True) if flip else (False,))
    ]


def is_square(picture: Picture, resolution: int) -> bool:
    """Return whether a picture is square once its shorter side is ``resolution``, so that it has one crop only."""
    return _resized(picture.width, picture.height, resolution) == (resolution, resolution)


def _resized(width: int, height: int, resolution: int) -> tuple[int, int]:
    short = min(width, height)
    return round(width * resolution / short), round(height * resolution / short)


def cut(image: Any, resolution: int, crop: Crop) -> Tensor:
    """Cut a crop out of a picture.

    Args:
        image: A PIL image, RGB.
        resolution: The crop's side in pixels.
        crop: Which crop.

    Returns:
        Its pixels from -1 to 1, ``(3, resolution, resolution)``.
    """
    import numpy
    import torch
    from PIL import Image, ImageOps

    image = image.resize(_resized(image.width, image.height, resolution), Image.Resampling.LANCZOS)
    if crop.flipped:
        image = ImageOps.mirror(image)
    box = (crop.left, crop.top, crop.left + resolution, crop.top + resolution)
    values = torch.from_numpy(numpy.asarray(image.crop(box)).copy())  # (height, width, 3)
    return values.permute(2, 0, 1).float() / 127.5 - 1
