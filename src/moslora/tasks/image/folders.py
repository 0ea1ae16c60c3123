"""Folders of pictures: what is in them, what each shows, and the squares that a denoiser learns.

A picture's words are the recipe's one prompt, or its caption: ``a.txt`` beside ``a.jpg``, or its line in
``metadata.jsonl`` (``file_name`` and ``text``, as ``datasets`` has it).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.pictures import open_image
from moslora.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Crop", "Folder", "Picture", "cut", "fill", "is_square", "places", "plan_crops", "read_folder"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
SHOWN = 5  # faults spelt out; the rest are counted
NARROWEST = 16  # sides' ratio; a square of more would be a blur, and the resized strip would fill the memory
PLACE = re.compile(r"\{(0|1|token|class_name)?\}")


@dataclass(frozen=True)
class Picture:
    """One picture of a folder.

    Attributes:
        path: The file.
        prompt: What it shows, in words.
        sha256: Of the file.
        width, height: In pixels, upright.
    """

    path: Path
    prompt: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Folder:
    """What was found in a folder.

    Attributes:
        pictures: The usable ones, by name.
        skipped: Why each of the others is left out; empty unless the recipe skips.
        sha256: Of all pictures and prompts together.
        unread: Captions that a prompt of the recipe stands for.
    """

    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]
    sha256: str
    unread: int = 0


def fill(template: str, token: str | None, class_name: str | None) -> str:
    """Put the subject's token and class into a prompt.

    Args:
        template: Words, with ``{}`` for the token and a second one for the class, or ``{0}`` and ``{1}``, or
            ``{token}`` and ``{class_name}``.
        token: What names the subject, as ``ikat``.
        class_name: What it is, as ``cat``.

    Returns:
        The prompt.

    Raises:
        ValueError: If a word is missing for a place, or there are other braces.

    Example:
        >>> fill("a {0} {1} in the jungle", "ikat", "cat")
        'a ikat cat in the jungle'
    """
    values = {"0": token, "1": class_name, "token": token, "class_name": class_name}
    order = iter(("token", "class_name"))

    def put(found: re.Match[str]) -> str:
        name = found[1] or next(order, "")
        if not name:
            raise ValueError(
                f"{template!r} has more than two places {{}}; they are the token's and the class's."
            )
        value = values[name]
        if value is None:
            key = {"0": "token", "1": "class_name"}.get(name, name)
            raise ValueError(f"{template!r} has a place for data.{key}, which the recipe does not set.")
        return value

    done = PLACE.sub(put, template)
    if "{" in done or "}" in done:
        raise ValueError(
            f"{template!r} has braces that are no place; write {{}}, {{token}} or {{class_name}}."
        )
    return done


def places(template: str) -> set[str]:
    """Return which of ``token`` and ``class_name`` a prompt has a place for."""
    order = iter(("token", "class_name"))
    numbered = {"0": "token", "1": "class_name"}
    names = (found[1] or next(order, "") for found in PLACE.finditer(template))
    return {numbered.get(name, name) for name in names} - {""}


def read_folder(
    folder: Path,
    prompt: str | None,
    max_pixels: int,
    skip_bad: bool,
    *,
    limit: int | None = None,
    name_words: Callable[[str], str] = str,
    checkpoint: Callable[[], None] = lambda: None,
) -> Folder:
    """Read a folder's pictures and captions; every picture is opened once.

    Args:
        folder: The folder.
        prompt: What all of them show; None reads captions.
        max_pixels: Most pixels that one may have.
        skip_bad: Whether unusable pictures are left out instead of refused.
        limit: Use only so many, the first by name.
        name_words: Fills templates in captions.
        checkpoint: Called after each picture.

    Returns:
        What was found.

    Raises:
        DataError: If the folder cannot be used; names every fault.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            str(folder), [f"it {what}"], "Give a folder of pictures; data sets of the hub are not read."
        )
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    captions, faults = _captions(folder, files)
    nested = [p.name for p in folder.iterdir() if p.is_dir()]
    if not files and not faults:
        inside = (
            f"it has folders ({', '.join(sorted(nested)[:3])}), which are not looked into" if nested else ""
        )
        faults.append(f"no picture ({', '.join(SUFFIXES)}) is in it" + (f"; {inside}" if inside else ""))
    found, bad = [], []
    for path in files[:limit]:
        try:
            image = open_image(path, max_pixels)
            if max(image.size) > NARROWEST * min(image.size):
                raise ValueError(
                    f"{path} has {image.width} × {image.height} pixels, too narrow to cut a square from"
                )
        except ValueError as problem:
            bad.append(str(problem))
            continue
        try:
            words = prompt if prompt is not None else name_words(captions[path.name])
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.append(Picture(path, words, digest, *image.size))
        except KeyError:
            faults.append(f"{path.name} has no caption: write {path.stem}.txt beside it, or set data.prompt")
        except ValueError as problem:
            faults.append(f"{path.name}: {problem}")
        checkpoint()
    if not skip_bad or not found:
        faults += bad
    if faults:
        advice = "Correct or remove these, or set data.bad_images=skip for broken ones; none was skipped."
        raise DataError(str(folder), faults[:SHOWN], advice, max(0, len(faults) - SHOWN))
    whole = hashlib.sha256(json.dumps([(p.sha256, p.prompt) for p in found]).encode()).hexdigest()
    unread = len(captions) if prompt is not None else 0
    return Folder(tuple(found), tuple(bad), whole, unread)


def _captions(folder: Path, files: Sequence[Path]) -> tuple[dict[str, str], list[str]]:
    """Return captions by the name of their picture, and what is wrong with them."""
    captions: dict[str, str] = {}
    faults: list[str] = []
    for path in files:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            try:
                text = beside.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                faults.append(f"{beside.name} is no UTF-8 text")
                continue
            if text:
                captions[path.name] = " ".join(text.split())
            else:
                faults.append(f"{beside.name} is empty")
    listed = folder / METADATA
    if not listed.is_file():
        return captions, faults
    names = {path.name for path in files}
    try:
        lines = listed.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        return captions, [*faults, f"{METADATA} is no UTF-8 text"]
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], next(row[key] for key in CAPTION_KEYS if key in row)
        except (json.JSONDecodeError, KeyError, TypeError, StopIteration):
            faults.append(f"{METADATA}, line {number}: expected an object with file_name and text")
            continue
        if not isinstance(text, str) or not text.strip():
            faults.append(f"{METADATA}, line {number}: field text is empty or no text")
        elif name not in names:
            faults.append(f"{METADATA}, line {number}: {name} is no picture of this folder")
        elif name in captions and captions[name] != " ".join(text.split()):
            faults.append(f"{METADATA}, line {number}: {name} has another caption already")
        else:
            captions[name] = " ".join(text.split())
    return captions, faults


@dataclass(frozen=True)
class Crop:
    """Which square of a picture is learned.

    Attributes:
        left, top: Where it starts, in pixels of the picture after it was resized and turned.
        flipped: Whether the whole picture is mirrored first.
    """

    left: int
    top: int
    flipped: bool


def plan_crops(picture: Picture, resolution: int, crop: str, count: int, flip: bool, seed: int) -> list[Crop]:
    """Choose the squares of a picture, once for the whole run.

    Args:
        picture: The picture.
        resolution: The square's side, to which the shorter side is resized.
        crop: ``"center"`` or ``"random"``.
        count: How many random ones.
        flip: Whether each is learned mirrored, too.
        seed: Of the random ones; they depend on it and on the picture's content.

    Returns:
        The squares.
    """
    import random

    width, height = _resized(picture.width, picture.height, resolution)
    across, down = width - resolution, height - resolution
    if crop == "center" or across == down == 0:
        places = [(across // 2, down // 2)]
    else:
        draw = random.Random(f"{seed} {picture.sha256}")
        places = [(draw.randint(0, across), draw.randint(0, down)) for _ in range(count)]
    return [
        Crop(left, top, flipped) for left, top in places for flipped in ((False, True) if flip else (False,))
    ]


def is_square(picture: Picture, resolution: int) -> bool:
    """Whether a picture is a square once its shorter side is ``resolution``, so that there is one crop of it."""
    return _resized(picture.width, picture.height, resolution) == (resolution, resolution)


def _resized(width: int, height: int, resolution: int) -> tuple[int, int]:
    short = min(width, height)
    return round(width * resolution / short), round(height * resolution / short)


def cut(image: Any, resolution: int, crop: Crop) -> Tensor:
    """Cut a square out of a picture.

    Args:
        image: A PIL image, RGB.
        resolution: The square's side in pixels.
        crop: Which square.

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
