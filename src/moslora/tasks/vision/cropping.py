"""How much of each picture a model's processor shows it, and pictures made square before it.

A processor may cut: CLIP's scales the short side and keeps the middle, so that half of a picture of 2 : 1 is never
seen. What is kept is measured on the processor itself, whatever its family does: a picture of the same size, black at
one end and white at the other, comes out with the brightness of the parts that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moslora.tasks.vision.processors import pixels

__all__ = ["Kept", "kept_of", "make_square", "mean_color", "measure_kept"]

# Scaling overshoots or blends a little at the edges; so much of a picture counts as whole.
WHOLE = 0.96
# Picture sizes that are measured, of those that data have; the most frequent first.
SIZES = 48


@dataclass(frozen=True)
class Kept:
    """What a processor keeps of a set of pictures.

    Attributes:
        pictures: How many were looked at, by their sizes.
        cut: How many of them lose a part.
        mean: Share of the area that is kept, averaged over all of them.
        least: Share that is kept of the picture that loses most.
        worst: That picture's width and height in pixels.
    """

    pictures: int
    cut: int
    mean: float
    least: float
    worst: tuple[int, int]

    def sentence(self) -> str:
        """Return what to know; empty if nothing is cut off."""
        if not self.cut:
            return ""
        width, height = self.worst
        return (
            f"the processor cuts a part off {self.cut} of {self.pictures} pictures: {1 - self.mean:.0%} of the area of "
            f"all, {1 - self.least:.0%} of one of {width} × {height} pixels. Set data.square=pad to show them whole"
        )


def make_square(picture: Any, how: str, color: tuple[int, int, int]) -> Any:
    """Make a picture square.

    Args:
        picture: A PIL image of mode RGB.
        how: ``"pad"`` puts it into the middle of a square of ``color``, as LLaVA and XTuner do; ``"crop"`` keeps the
            middle; ``"none"`` leaves it.
        color: Red, green, blue, to 255.
    """
    from PIL import Image

    width, height = picture.size
    if how == "none" or width == height:
        return picture
    side = max(width, height) if how == "pad" else min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if how == "crop":
        return picture.crop((left, top, left + side, top + side))
    square = Image.new("RGB", (side, side), color)
    square.paste(picture, (-left, -top))
    return square


def mean_color(processor: Any) -> tuple[int, int, int]:
    """Return the color that a model's processor turns into zeros: its mean; black if it has none.

    Args:
        processor: The model's.
    """
    mean = getattr(processor.image_processor, "image_mean", None) or (0.0, 0.0, 0.0)
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def kept_of(processor: Any, width: int, height: int) -> float:
    """Return the share of a picture's area that a model's processor shows it.

    Args:
        processor: The model's.
        width, height: Of the picture, in pixels.
    """
    across = _seen(processor, [[255 * x / max(1, width - 1) for x in range(width)]] * height)
    down = _seen(processor, [[255 * y / max(1, height - 1)] * width for y in range(height)])
    return across * down


def _seen(processor: Any, brightness: Any) -> float:
    """Return the range of a gradient that comes out, of the range that went in."""
    import numpy as np
    from PIL import Image

    values = np.rint(np.asarray(brightness)).astype(np.uint8)
    shown = [np.zeros_like(values), np.full_like(values, 255), values]
    black, white, found = (
        _outputs(processor, Image.fromarray(np.stack([one] * 3, axis=-1))) for one in shown
    )
    inside = white > black  # elsewhere it is padding
    if not inside.any():
        return 1.0
    levels = np.unique(np.round((found[inside] - black[inside]) / (white[inside] - black[inside]), 3))
    if len(levels) == 1:
        return 1.0  # one pixel
    # Each level is the middle of a pixel: with half a pixel on both sides they reach over what is kept.
    kept = float(levels[-1] - levels[0]) * len(levels) / (len(levels) - 1)
    return 1.0 if kept >= WHOLE else kept


def _outputs(processor: Any, picture: Any) -> Any:
    """Return every number that a model gets of a picture."""
    import numpy as np

    found = pixels(processor, [picture])
    return np.asarray(found["pixel_values"].float()).ravel()


def measure_kept(processor: Any, sizes: Mapping[tuple[int, int], int], how: str) -> Kept | None:
    """Measure what a processor keeps of a set of pictures.

    Args:
        processor: The model's.
        sizes: How many pictures there are of each width and height.
        how: What is done before it, as for ``make_square``.

    Returns:
        The figures, of the most frequent sizes; None without a picture.
    """
    chosen = sorted(sizes, key=lambda size: -sizes[size])[:SIZES]
    if not chosen:
        return None
    kept = {size: _kept_square(size, how) * kept_of(processor, *_square(size, how)) for size in chosen}
    total = sum(sizes[size] for size in chosen)
    worst = min(chosen, key=kept.__getitem__)
    return Kept(
        total,
        sum(sizes[size] for size in chosen if kept[size] < 1),
        sum(kept[size] * sizes[size] for size in chosen) / total,
        kept[worst],
        worst,
    )


def _square(size: tuple[int, int], how: str) -> tuple[int, int]:
    side = {"none": 0, "pad": max(size), "crop": min(size)}[how]
    return (side, side) if side else size


def _kept_square(size: tuple[int, int], how: str) -> float:
    return min(size) / max(size) if how == "crop" else 1.0
