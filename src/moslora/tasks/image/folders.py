"""Folders of pictures: reading them with their captions, and naming what cannot be used.

A picture's words are the recipe's one prompt, or its caption: ``a.txt`` beside ``a.jpg``, or its line in
``metadata.jsonl`` (``file_name`` and ``text``, as in ``datasets``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moslora.data.columns import Unread, unread_keys
from moslora.data.pictures import SUFFIXES, open_image
from moslora.data.strict_json import parse_json
from moslora.errors import DataError

__all__ = ["Folder", "Picture", "read_folder", "together", "warn_of_left_out"]

# Of pictures that are not read: leaving them out in silence would train on fewer than are there.
OTHER_SUFFIXES = (
    *(
        ".gif",
        ".apng",
        ".avif",
        ".heic",
        ".heif",
        ".jfif",
        ".jp2",
        ".jxl",
        ".ppm",
        ".tga",
        ".psd",
        ".eps",
        ".svg",
    ),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"),
)
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
SHOWN = 5  # faults that a message names; the others are counted
NARROWEST = (
    16  # largest ratio of the sides; beyond it a crop is a blur and the resized picture fills the memory
)


@dataclass(frozen=True)
class Picture:
    """One picture of a folder.

    Attributes:
        path: The file.
        prompt: What it shows, in words.
        sha256: Of the file.
        width, height: In pixels, after rotation by its EXIF orientation.
    """

    path: Path
    prompt: str
    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Folder:
    """The pictures of a folder.

    Attributes:
        pictures: The usable ones, sorted by name.
        skipped: Why each of the others is left out; empty unless broken pictures may be skipped.
        sha256: Of all pictures and prompts together.
        unread: The number of captions that are replaced by the recipe's prompt.
    """

    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]
    sha256: str
    unread: int = 0


def read_folder(
    folder: Path,
    prompt: str | None,
    max_pixels: int,
    skip_bad: bool,
    *,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    name_words: Callable[[str], str] = str,
    checkpoint: Callable[[], None] = lambda: None,
) -> Folder:
    """Read a folder's pictures and captions; every picture is opened once.

    Args:
        folder: The folder.
        prompt: The prompt of all pictures; None reads captions.
        max_pixels: The most pixels that a picture may have.
        skip_bad: Leave unusable pictures out, instead of refusing them.
        limit: Use only this many pictures, the first by name.
        ignore: Fields of ``metadata.jsonl`` that are dropped.
        name_words: Fills templates in captions.
        checkpoint: Called after each picture.

    Returns:
        The pictures with their words.

    Raises:
        DataError: If the folder cannot be used; names every fault.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            str(folder), [f"it {what}"], "Name a folder of pictures; data sets of the hub are not supported."
        )
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    captions, faults = _captions(folder, files, ignore)
    nested = [p.name for p in folder.iterdir() if p.is_dir()]
    if not files and not faults:
        inside = f"it has folders ({', '.join(sorted(nested)[:3])}), which are not searched" if nested else ""
        faults.append(f"it has no picture ({', '.join(SUFFIXES)})" + (f"; {inside}" if inside else ""))
    pictures = []
    bad = [
        f"{path} is not of a supported format ({', '.join(SUFFIXES)}); save it as PNG"
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in OTHER_SUFFIXES and not path.name.startswith(".")
    ]
    for path in files[:limit]:
        try:
            image = open_image(path, max_pixels)
            if max(image.size) > NARROWEST * min(image.size):
                raise ValueError(
                    f"{path} has {image.width} × {image.height} pixels, too narrow for a square crop"
                )
        except ValueError as error:
            bad.append(str(error))
            continue
        try:
            words = prompt if prompt is not None else name_words(captions[path.name])
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            pictures.append(Picture(path, words, digest, *image.size))
        except KeyError:
            faults.append(f"{path.name} has no caption: write {path.stem}.txt beside it, or set data.prompt")
        except ValueError as error:
            faults.append(f"{path.name}: {error}")
        checkpoint()
    if not skip_bad or not pictures:
        faults += bad
    if faults:
        advice = "Correct or remove them, or set data.bad_images=skip to leave broken pictures out; none was skipped."
        raise DataError(str(folder), faults[:SHOWN], advice, max(0, len(faults) - SHOWN))
    all_together = hashlib.sha256(json.dumps([(p.sha256, p.prompt) for p in pictures]).encode()).hexdigest()
    unread = len(captions) if prompt is not None else 0
    return Folder(tuple(pictures), tuple(bad), all_together, unread)


def together(folders: Sequence[Folder]) -> Folder:
    """Make one folder of several, which are learned in one run.

    Args:
        folders: Of each subject, in order.
    """
    if len(folders) == 1:
        return folders[0]
    return Folder(
        tuple(picture for folder in folders for picture in folder.pictures),
        tuple(reason for folder in folders for reason in folder.skipped),
        hashlib.sha256("".join(folder.sha256 for folder in folders).encode()).hexdigest(),
        sum(folder.unread for folder in folders),
    )


def _captions(folder: Path, files: Sequence[Path], ignore: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return captions by the file name of their picture, and the faults of captions."""
    captions: dict[str, str] = {}
    faults: list[str] = []
    for path in files:
        beside = path.with_suffix(".txt")
        if beside.is_file():
            try:
                text = beside.read_text(encoding="utf-8-sig").strip()
            except UnicodeDecodeError:
                faults.append(f"{beside.name} is not UTF-8 text")
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
        return captions, [*faults, f"{METADATA} is not UTF-8 text"]
    unread = Unread()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = {key: value for key, value in parse_json(line).items() if key not in ignore}
            given = [key for key in CAPTION_KEYS if row.get(key) is not None]
            name, text = row["file_name"], row[given[0]]
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            faults.append(f"{METADATA}, line {number}: expected an object with file_name and text")
            continue
        unread.add(f"{METADATA}, line {number}", unread_keys(row, ("file_name", given[0])))
        if not isinstance(text, str) or not text.strip():
            faults.append(f"{METADATA}, line {number}: field text is empty or not text")
        elif name not in names:
            faults.append(f"{METADATA}, line {number}: {name} is not a picture in this folder")
        elif name in captions and captions[name] != " ".join(text.split()):
            faults.append(f"{METADATA}, line {number}: {name} already has another caption")
        else:
            captions[name] = " ".join(text.split())
    if unread:
        faults += [*unread.faults(), unread.advice().rstrip(".")]
    return captions, faults


def warn_of_left_out(name: str, folder: Folder, warn: Callable[[str], None]) -> None:
    """Report skipped pictures and captions that are not used.

    Args:
        name: The folder, as the recipe names it.
        folder: What was read of it.
        warn: Told of it.
    """
    if folder.skipped:
        some = "; ".join(folder.skipped[:SHOWN])
        more = f"; and {len(folder.skipped) - SHOWN} more" if len(folder.skipped) > SHOWN else ""
        warn(f"{name}: skipped {len(folder.skipped)} pictures: {some}{more}.")
    if folder.unread:
        warn(f"{name} has {folder.unread} captions, which are not read because data.prompt is set.")
