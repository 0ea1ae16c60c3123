"""Conversations about pictures, read from a data file: every picture is opened once, to be checked and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.columns import says_nothing, without_keys
from moslora.data.faults import SHOWN
from moslora.data.files import Records
from moslora.data.naming import rename_columns
from moslora.data.pictures import open_image
from moslora.data.shapes import Example, to_examples
from moslora.data.sources import read_alone
from moslora.errors import DataError, PictureError
from moslora.tasks.vision.cropping import make_square
from moslora.tasks.vision.processors import IMAGE

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.recipe.schema import VisionDataSection

__all__ = ["PictureFiles", "read_examples", "split_off_images"]

CONVERSATIONS = ("messages", "conversations", "prompt", "completion")  # columns that may be lists of turns
QUESTIONS = ("prompt", "instruction", "input")  # columns that may be a question's text
# Of a part of type image, where chat templates of transformers find the picture.
PICTURE_KEYS = ("image", "path", "url")


class PictureFiles:
    """The picture files that examples show.

    Args:
        max_pixels: Most pixels that a picture may have.

    Attributes:
        paths: Files by part of the data and place, such as ``"heldout row 3"``.
        hashes: SHA-256 by file.
        sizes: Width and height in pixels by file.
        square: What is done to a picture before the model's processor gets it, and the color to pad with; set once
            the processor is loaded.
    """

    def __init__(self, max_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.paths: dict[str, list[Path]] = {}
        self.hashes: dict[str, str] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.square: tuple[str, tuple[int, int, int]] = ("none", (0, 0, 0))

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
            picture = open_image(path, self.max_pixels)
            if str(path) not in self.hashes:
                self.sizes[str(path)] = picture.size
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
            pictures = [open_image(path, self.max_pixels) for path in self.of(part, example)]
        except PictureError as problem:
            raise PictureError(f"{example.place}: {problem}") from None
        return [make_square(picture, *self.square) for picture in pictures]

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
) -> tuple[list[Example], dict[str, str], tuple[Records, set[str]]]:
    """Read examples and check their pictures.

    Args:
        part: ``"train"`` or ``"heldout"``.
        source, split, limit: As for ``read_records``.
        data: The recipe's ``data`` section.
        pictures: Receives their files.
        display: Where warnings are shown.
        raise_if_stopped: Called after each example.

    Returns:
        The examples, hashes of the file and of the pictures by name, and the rows with the entries of ``data.ignore``
        that they have.

    Raises:
        DataError: If a row or a picture cannot be used, or none is left.
    """
    records, present = without_keys(read_alone(source, data, split, limit), data.ignore or ())
    folder = Path(data.images) if data.images else Path(records.source).parent
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    row_faults: list[str] = []
    picture_faults: list[str] = []
    records = rename_columns(records, data.columns)
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
    usable = Records(rows, places, records.source, records.sha256)
    examples = to_examples(usable, data.format, data.reasoning, data.system_turn)
    return examples, hashes, (records, present)


def split_off_images(row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Separate a row's pictures from its text, and check that each has a placeholder there.

    Args:
        row: A row of a data file, in LLaVA's or OpenAI's form. Without any placeholder, pictures come before the first
            question. A turn that is a list of parts may have its pictures within: ``{"type": "image", "image": name}``.

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
    questions: list[tuple[dict[str, Any], str]] = []  # who has a question's text, and under which key
    within: list[str] = []  # pictures that parts of turns name
    for column in CONVERSATIONS:
        if isinstance(text_row.get(column), list):
            text_row[column] = _turns_as_text(text_row[column], column, questions, within)
    questions += [(text_row, key) for key in QUESTIONS if isinstance(text_row.get(key), str)]
    if within and names:
        raise PictureError("pictures are both in a field of their own and within turns; remove one")
    names = names or within
    placeholders = sum(turn[key].count(IMAGE) for turn, key in questions)
    if names and not placeholders and questions:
        turn, key = questions[0]
        turn[key] = IMAGE * len(names) + "\n" + turn[key]
    elif placeholders != len(names):
        raise PictureError(
            f"{len(names)} pictures, but {IMAGE} occurs {placeholders} times in the user's turns; make them equal"
        )
    return text_row, names


def _turns_as_text(
    turns: list[Any], column: str, questions: list[tuple[dict[str, Any], str]], within: list[str]
) -> list[Any]:
    """Return turns whose parts are joined to texts; add the user's to ``questions``, named pictures to ``within``."""
    turns = [dict(turn) if isinstance(turn, Mapping) else turn for turn in turns]
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict):
            continue  # to_examples reports what is wrong
        key = "value" if turn.get("value") is not None else "content"
        if isinstance(turn.get(key), list):
            first = sum(turn[key].count(IMAGE) for turn, key in questions)
            turn[key], named = _joined(turn[key], column, f"{column}[{index}].{key}", first)
            within += named
        is_user = (turn.get("role") or turn.get("from")) in ("user", "human")
        if isinstance(turn.get(key), str) and IMAGE in turn[key] and not is_user:
            raise PictureError(f"{IMAGE} is in a turn that is not the user's")
        if is_user and isinstance(turn.get(key), str):
            questions.append((turn, key))
    return turns


def _joined(parts: Sequence[Any], column: str, where: str, first: int) -> tuple[str, list[str]]:
    """Return a turn's parts as one text with pictures as placeholders, and the pictures that the parts name.

    ``first`` is the number of the first picture.
    """
    if not all(isinstance(part, dict) and part.get("type") in ("text", "image") for part in parts):
        raise PictureError("a turn's parts must be of type text or image")
    texts: list[str] = []
    named: list[str] = []
    for index, part in enumerate(parts):
        is_text = part["type"] == "text"
        # Some data number their pictures, which is no more than their order.
        counted = ["index"] if part.get("index") == first else []
        own = {"type", "text"} if is_text else {"type", *PICTURE_KEYS, *counted}
        first += not is_text
        unread = next((key for key in part if key not in own and not says_nothing(part[key])), None)
        if unread is not None:
            raise PictureError(
                f"field {f'{where}[{index}].{unread}'!r} would be ignored: pictures are named in the row's images, in "
                f"their order. To drop it: data.ignore=[{column}.{where.rpartition('.')[2]}.{unread}]"
            )
        if is_text and not isinstance(part.get("text"), str):
            raise PictureError(f"field {f'{where}[{index}].text'!r} is not text")
        texts.append(part["text"] if is_text else IMAGE)
        named += [] if is_text else _named_by(part)
    if named and len(named) != texts.count(IMAGE):
        raise PictureError("some parts of type image name a picture and some do not; name all or none")
    return "".join(texts), named


def _named_by(part: Mapping[str, Any]) -> list[str]:
    """Return the picture that a part of type image names, if it does."""
    pictures = [part[key] for key in PICTURE_KEYS if part.get(key) is not None]
    if len(pictures) > 1 or not all(isinstance(picture, str) for picture in pictures):
        raise PictureError("a part of type image must name one file, as image, path or url")
    if pictures and pictures[0].startswith(("http:", "https:", "data:")):
        raise PictureError("a part of type image names a URL; save the picture as a file, and name that")
    return pictures
