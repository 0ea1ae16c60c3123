"""Pictures of training data, opened as RGB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moslora.errors import PictureError
from moslora.files import kind_of_file

__all__ = ["open_image"]


def open_image(path: Path, max_pixels: int) -> Any:
    """Open a picture as RGB, upright; a transparent one on white.

    Args:
        path: The file.
        max_pixels: Most pixels it may have.

    Returns:
        A PIL image of mode RGB.

    Raises:
        PictureError: If it is missing, damaged, too large, or of a mode without a fixed range of brightness.
    """
    from PIL import Image, ImageOps

    kind = kind_of_file(path)
    if kind:
        raise PictureError(
            f"{path} does not exist" if kind == "missing" else f"{path} is {kind}, not a picture"
        )
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise PictureError(
                    f"{path} has {width} × {height} pixels, more than data.max_pixels={max_pixels}"
                )
            if picture.mode.startswith(("I", "F")):
                raise PictureError(
                    f"{path} is of mode {picture.mode}, which has no fixed white; save it as 8-bit RGB"
                )
            upright = ImageOps.exif_transpose(picture)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright.convert("RGBA"))
            return upright.convert("RGB")
    except PictureError:
        raise
    except Image.DecompressionBombError as problem:
        raise PictureError(f"{path} is too large: {problem}") from None
    except Exception as problem:  # PIL's readers raise many types for a damaged file
        raise PictureError(f"{path} is broken: {problem}") from None
