"""Conversations about pictures, read from a data file: every picture is opened once, to be checked and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.faults import SHOWN
from moslora.data.files import Records, read_records
from moslora.data.pictures import open_image
from moslora.data.shapes import Example, to_examples
from moslora.errors import DataError, PictureError
from moslora.tasks.vision.processors import IMAGE

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.recipe.schema import VisionDataSection

__all__ = ["PictureFiles", "read_examples", "split_off_images"]


class PictureFiles:
    """The picture files that examples show.

    Args:
        max_pixels: Most pixels that a picture may have.

    Attributes:
        paths: Files by part of the data and place, such as ``"heldout row 3"``.
        hashes: SHA-256 by file.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.paths: dict[str, list[Path]] = {}
        self.hashes: dict[str, str] = {}

    def add(self, part: str, place: str, paths: Sequence[Path]) -> None:
        """Check and hash an example's pictures.

        Args:
            part: ``"train"`` or ``"heldout"``.
            place: Where the example is in its file.
            paths: The pictures, in their order.

        Raises:
            PictureError: If one cannot be used.
        """
        for path in paths:
            open_image(path, self.max_pixels)
            if str(path) not in self.hashes:
                self.hashes[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        self.paths[f"{part} {place}"] = list(paths)

    def of(self, part: str, example: Example) -> list[Path]:
        """Return the files that an example shows.

        Args:
            part: ``"train"``, ``"heldout"`` or ``"validation"``.
            example: The example.
        """
        # Validation examples are set aside from the training data.
        return self.paths[f"{'train' if part == 'validation' else part} {example.place}"]

    def hashes_of(self, part: str, example: Example) -> list[str]:
        """Return the hashes of the pictures that an example shows, in their order.

        Args:
            part: As for ``of``.
            example: The example.
        """
        return [self.hashes[str(path)] for path in self.of(part, example)]

    def open(self, part: str, example: Example) -> list[Any]:
        """Open the pictures that an example shows, in their order.

        Args:
            part: As for ``of``.
            example: The example.

        Raises:
            PictureError: If one can no longer be read.
        """
        try:
            return [open_image(path, self.max_pixels) for path in self.of(part, example)]
        except PictureError as problem:
            raise PictureError(f"{example.place}: {problem}") from None

    def sha256(self) -> str:
        """Return a hash of all pictures so far, whatever their order."""
        return hashlib.sha256("".join(sorted(set(self.hashes.values()))).encode()).hexdigest()


def read_examples(
    part: str,
    source: str,
    split: str,
    limit: int | None,
    data: VisionDataSection,
    pictures: PictureFiles,
    display: Display,
    raise_if_stopped: Callable[[], None],
) -> tuple[list[Example], dict[str, str]]:
    """Read examples and check their pictures.

    Args:
        part: ``"train"`` or ``"heldout"``.
        source, split, limit: As for ``read_records``.
        data: The recipe's ``data`` section.
        pictures: Receives their files.
        display: Where warnings are shown.
        raise_if_stopped: Called after each example.

    Returns:
        The examples, and hashes of the file and of the pictures by name.

    Raises:
        DataError: If a row or a picture cannot be used, or none is left.
    """
    records = read_records(source, split, limit)
    folder = Path(data.images) if data.images else Path(records.source).parent
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    row_faults: list[str] = []
    picture_faults: list[str] = []
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            text_row, names = split_off_images(row)
        except PictureError as problem:
            row_faults.append(f"{place}: {problem}")
            continue
        try:
            pictures.add(part, place, [folder / name for name in names])
        except PictureError as problem:
            picture_faults.append(f"{place}: {problem}")
            continue
        rows.append(text_row)
        places.append(place)
        raise_if_stopped()
    faults = row_faults + (picture_faults if data.bad_images == "refuse" else [])
    if faults:
        advice = "Correct or remove these, or set data.bad_images=skip for pictures; none was skipped."
        raise DataError(records.source, faults[:SHOWN], advice, max(0, len(faults) - SHOWN))
    if picture_faults:
        more = f" and {len(picture_faults) - SHOWN} more" if len(picture_faults) > SHOWN else ""
        display.warn(
            f"{records.source}: skipped {len(picture_faults)} examples: "
            f"{'; '.join(picture_faults[:SHOWN])}{more}."
        )
    if not rows:
        raise DataError(records.source, ["no example has a usable picture"], "Check data.images.")
    hashes = {part: records.sha256, f"{part}_pictures": pictures.sha256()}
    return to_examples(Records(rows, places, records.source, records.sha256), data.format), hashes


def split_off_images(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Separate a row's pictures from its text, and check that each has a placeholder there.

    Args:
        row: A row of a data file, in LLaVA's or OpenAI's form. Without any placeholder, pictures come before the first
            question.

    Returns:
        The row without its pictures, and their names.

    Raises:
        PictureError: If pictures and placeholders do not match.
    """
    value = row.get("images") if row.get("images") is not None else row.get("image")
    names = [value] if isinstance(value, str) else list(value or [])
    if row.get("image") and row.get("images"):
        raise PictureError("fields 'image' and 'images' are both given; remove one")
    if not all(isinstance(name, str) for name in names):
        raise PictureError("pictures must be names of files in data.images")
    text_row = {key: value for key, value in row.items() if key not in ("image", "images")}
    column = "conversations" if text_row.get("conversations") is not None else "messages"
    turns = text_row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return text_row, names  # to_examples reports what is wrong
    turns = [dict(turn) for turn in turns]
    questions = []  # turns of the user, and the key of their text
    for turn in turns:
        key = "value" if "value" in turn else "content"
        if isinstance(turn.get(key), list):
            turn[key] = _joined(turn[key])
        is_user = turn.get("role", turn.get("from")) in ("user", "human")
        if isinstance(turn.get(key), str) and IMAGE in turn[key] and not is_user:
            raise PictureError(f"{IMAGE} is in a turn that is not the user's")
        if is_user and isinstance(turn.get(key), str):
            questions.append((turn, key))
    placeholders = sum(turn[key].count(IMAGE) for turn, key in questions)
    if names and not placeholders and questions:
        turn, key = questions[0]
        turn[key] = IMAGE * len(names) + "\n" + turn[key]
    elif placeholders != len(names):
        raise PictureError(
            f"{len(names)} pictures, but {IMAGE} occurs {placeholders} times in the user's turns; make them equal"
        )
    text_row[column] = turns
    return text_row, names


def _joined(parts: Sequence[Any]) -> str:
    """Return a turn's parts as one text, pictures as placeholders."""
    if not all(isinstance(part, dict) and part.get("type") in ("text", "image") for part in parts):
        raise PictureError("a turn's parts must be of type text or image")
    return "".join(IMAGE if part["type"] == "image" else str(part.get("text", "")) for part in parts)
