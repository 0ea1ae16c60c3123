"""Pictures of training data, opened as RGB.

What a picture is decides its content, never its name, and only the formats of ``FORMATS`` are tried: others of Pillow's
readers start other programs (EPS), or have several pictures in a file, of which one would be taken in silence.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from moslora.bounded import kind_of_file
from moslora.errors import PictureError

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "StoredPicture",
    "open_image",
    "open_picture",
    "refuse_several_frames",
    "with_pictures_stored",
]

# As Pillow calls them. A JPEG with further pictures behind it, as cameras write them, is opened as one, and then called
# MPO: the first is the photo.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SUPPORTED = "JPEG, PNG, WebP, BMP and TIFF"
# How files of other formats begin, from which byte on, and what they are.
OTHERS = (
    (0, b"GIF8", "a GIF"),
    (0, b"%!PS", "an EPS or PostScript file"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS file"),
    (0, b"%PDF", "a PDF"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an SVG drawing or other XML"),
    (4, b"ftypavi", "an AVIF"),
    (4, b"ftyphei", "a HEIC"),
    (4, b"ftypmif", "a HEIC"),
    (4, b"jP  ", "a JPEG 2000"),
    (0, b"\xff\x0a", "a JPEG XL"),
    (4, b"JXL ", "a JPEG XL"),
    (0, b"\x00\x00\x01\x00", "an icon"),
)
DEPTH_OF_PNG = 24  # the byte that says how many bits a sample has
BITS_OF_TIFF = 258  # the tag that does


def open_image(source: Path | bytes, max_pixels: int) -> Any:
    """Open a picture as RGB, upright; a transparent one on white.

    Args:
        source: The file, or its bytes.
        max_pixels: Most pixels it may have.

    Returns:
        A PIL image of mode RGB.

    Raises:
        PictureError: If it is missing, damaged, too large, of another format than ``FORMATS``, has several frames or
            more than 8 bits a channel.
    """
    from PIL import Image

    kind = "" if isinstance(source, bytes) else kind_of_file(source)
    if kind:
        raise PictureError(
            f"{source!s} does not exist" if kind == "missing" else f"{source!s} is {kind}, not a picture"
        )
    name = "the picture" if isinstance(source, bytes) else str(source)
    with open_picture(source, name, max_pixels) as upright:
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            white = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(white, upright.convert("RGBA"))
        return upright.convert("RGB")


@contextlib.contextmanager
def open_picture(source: Path | bytes, name: str, max_pixels: int | None = None) -> Iterator[Any]:
    """Open a picture of a supported format, upright, in its own mode.

    Args:
        source: The file, or its content.
        name: What messages call it.
        max_pixels: Most pixels it may have; None for Pillow's own limit.

    Yields:
        A PIL image.

    Raises:
        PictureError: As of ``open_image``; whatever the block raises of Pillow's becomes one, too.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        head = _head(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit
            with Image.open(file, formats=FORMATS) as picture:
                _check(picture, head, name, max_pixels)
                yield ImageOps.exif_transpose(picture)
    except PictureError:
        raise
    except UnidentifiedImageError:
        raise PictureError(f"{name} {_what_it_is(head)}") from None
    except Image.DecompressionBombError as problem:
        raise PictureError(f"{name} is too large: {problem}") from None
    except Exception as problem:  # PIL's readers raise many types for a damaged file
        raise PictureError(f"{name} is broken: {problem}") from None


def refuse_several_frames(picture: Any, name: str) -> None:
    """Refuse an animation, of which the first frame would stand for all.

    Args:
        picture: A PIL image.
        name: What messages call it.

    Raises:
        PictureError: If it has more than one frame; an MPO's first is the photo, and the others are left.
    """
    frames = getattr(picture, "n_frames", 1)
    if frames > 1 and picture.format != "MPO":
        raise PictureError(f"{name} has {frames} frames; save the one that is meant as a picture of its own")


def _check(picture: Any, head: bytes, name: str, max_pixels: int | None) -> None:
    """Refuse what would be cut, rounded or too large, before any pixel is decoded."""
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        raise PictureError(f"{name} has {width} × {height} pixels, more than data.max_pixels={max_pixels}")
    if picture.mode.startswith(("I", "F")):
        raise PictureError(
            f"{name} is of mode {picture.mode}, which has no fixed white; save it as 8-bit RGB"
        )
    bits = 8
    if picture.format == "PNG":
        bits = head[DEPTH_OF_PNG]
    elif picture.format == "TIFF":
        bits = max(picture.tag_v2.get(BITS_OF_TIFF, (8,)))
    if bits > 8:
        raise PictureError(
            f"{name} has {bits} bits a channel, of which 8 would be left; save it as 8-bit RGB"
        )
    refuse_several_frames(picture, name)


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with source.open("rb") as file:
        return file.read(64)


def _what_it_is(head: bytes) -> str:
    for start, magic, what in OTHERS:
        if head[start : start + len(magic)] == magic:
            return f"is {what}, whatever its name; supported: {SUPPORTED}. Save it as PNG"
    return f"is broken, or no picture of a supported format ({SUPPORTED})"


# --- Pictures in data sets -----------------------------------------------------------------------------------


class StoredPicture(dict[str, Any]):
    """A picture as ``datasets`` stores it: ``bytes`` and ``path``, one of which may be None."""


def with_pictures_stored(rows: Iterable[Any]) -> Iterable[Any]:
    """Return rows; those of a ``datasets.Dataset`` with their pictures as ``StoredPicture``.

    ``datasets`` decodes pictures when a row is read, with whatever reader of Pillow's their content asks for.

    Args:
        rows: A ``datasets.Dataset``, or dicts.
    """
    features = getattr(rows, "features", None)
    if not features or not any(map(_has_pictures, features.values())):
        return rows
    names = [name for name, feature in features.items() if _has_pictures(feature)]
    table: Any = rows
    for name in names:
        table = table.cast_column(name, _undecoded(features[name]))
    return ({**row, **{name: _stored(features[name], row[name]) for name in names}} for row in table)


def _has_pictures(feature: Any) -> bool:
    return "Image(" in repr(feature)


def _undecoded(feature: Any) -> Any:
    """Return a feature whose pictures stay as they are stored."""
    if type(feature).__name__ == "Image":
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):  # a list of pictures
        return type(feature)(_undecoded(feature.feature))
    return feature


def _stored(feature: Any, value: Any) -> Any:
    """Mark the pictures in a value."""
    if value is None or not _has_pictures(feature):
        return value
    if type(feature).__name__ == "Image":
        return StoredPicture(value)
    if isinstance(feature, dict):
        return {name: _stored(inner, value[name]) for name, inner in feature.items()}
    inner = feature[0] if isinstance(feature, list) else feature.feature
    return [_stored(inner, item) for item in value]
