"""Rows of Python objects as a JSON Lines file, so that they are hashed, resumed and reported as any data file."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moslora.data.faults import SHOWN
from moslora.data.pictures import StoredPicture, open_picture, refuse_several_frames, with_pictures_stored
from moslora.errors import DataError
from moslora.files import replaced_file

__all__ = ["write_rows"]


def write_rows(rows: Iterable[Any], path: Path, what: str, pictures: Path | None = None) -> None:
    """Write rows, pictures in them as files beside.

    Args:
        rows: A ``datasets.Dataset``, or dicts. Values are those of JSON, scalars and arrays of numpy, or PIL images.
        path: The ``.jsonl`` file to write.
        what: What the caller calls the rows, for messages.
        pictures: Folder of the pictures; None for ``pictures`` beside the file.

    Raises:
        DataError: If a row is not a dict or a value has no form in JSON; each is named by its row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place = pictures or path.parent / "pictures"
    faults: list[str] = []
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for number, row in enumerate(with_pictures_stored(rows), start=1):
            if not isinstance(row, Mapping):
                faults.append(f"row {number}: is a {type(row).__name__}; expected a dict with named fields")
                continue
            try:
                line = json.dumps(
                    {str(name): _as_json(value, place) for name, value in row.items()},
                    ensure_ascii=False,
                    allow_nan=False,
                )
            except RecursionError:
                faults.append(f"row {number}: has too many nested levels, or a value that holds itself")
                continue
            except (TypeError, ValueError, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # of the disk, not of a picture
                faults.append(f"row {number}: {error}")
                continue
            file.write(line + "\n")
    if faults:
        advice = "Give numbers, texts, lists, dicts and PIL images; none of the rows was skipped."
        raise DataError(what, faults[:SHOWN], advice, max(0, len(faults) - SHOWN))


def _as_json(value: Any, folder: Path) -> Any:
    """Return a value in JSON's types; a picture becomes the path of a file."""
    if isinstance(value, StoredPicture):
        name = str(value["path"] or "a picture")
        with open_picture(value["bytes"] or Path(name), name) as picture:
            return _save_picture(picture, folder)
    if isinstance(value, Mapping):
        return {str(name): _as_json(item, folder) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item, folder) for item in value]
    if type(value).__module__.partition(".")[0] == "PIL":
        return _save_picture(value, folder)
    if type(value).__module__ == "numpy":
        return value.tolist()
    return value


def _save_picture(picture: Any, folder: Path) -> str:
    """Save a picture without loss, upright, named by its content, and return its path."""
    from PIL import ImageOps

    kind = picture.format or "PIL"
    refuse_several_frames(picture, f"the {kind} picture")
    if picture.format in ("EPS", "WMF"):
        raise ValueError(
            f"the {kind} picture is a drawing that another program would have to draw; give its pixels"
        )
    if picture.mode.startswith("F"):
        raise ValueError(f"the picture is of mode {picture.mode}, which has no fixed white; give 8-bit RGB")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        picture = picture.convert("RGB")  # as a file of this mode is read
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    content = buffer.getvalue()
    path = folder / f"{hashlib.sha256(content).hexdigest()[:24]}.png"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        with replaced_file(path) as part:  # a picture cut off would be taken for this one later
            part.write_bytes(content)
    return str(path.absolute())
