"""The TSV files in which vision-language benchmarks are published (VLMEvalKit's), read without holding their pictures.

One pass keeps the text of every row and where the row lies in the file; a row is read again when its pictures are
shown. Every cell stays text. pandas, with which these files are usually read, takes the option ``None`` for an absent
one, and turns a column of whole numbers with gaps into ``1.0``, ``2.0``.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moslora.data.faults import SHOWN, quoted
from moslora.errors import DataError, PictureError

__all__ = ["LETTERS", "BenchmarkFile", "Item", "read_benchmark_file"]

BOM = b"\xef\xbb\xbf"
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
# An image cell of at most so many characters is the index of another row (VLMEvalKit, image_base.py).
LONGEST_REFERENCE = 64
# A record that is longer has a quote that is never closed; pictures in these files have some MB.
LONGEST_RECORD = 1 << 28
PICTURE_COLUMNS = ("image", "image_path")
# What pandas.read_csv takes for an empty cell.
EMPTY_TO_PANDAS = (
    "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null"
)
READ_AS_EMPTY = frozenset(EMPTY_TO_PANDAS.split(","))


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a benchmark.

    Attributes:
        index: Its index, as it is written.
        line: Where it begins in the file, from 1.
        cells: Its text by column, without the column ``image`` and empty cells.
        pictures: How many pictures it shows, at least 1.
        shown_by: Position of the row that has its pictures: its own, or that of the row it refers to.
        shows: Equal for items that show the same pictures.
    """

    index: str
    line: int
    cells: Mapping[str, str]
    pictures: int
    shown_by: int
    shows: str

    @property
    def options(self) -> dict[str, str]:
        """The text of each option, by its letter."""
        return {letter: self.cells[letter] for letter in LETTERS if letter in self.cells}


@dataclass(frozen=True)
class BenchmarkFile:
    """A benchmark's rows.

    Attributes:
        path: The file.
        sha256, md5: Of its bytes; benchmarks are published with their MD5.
        columns: Of its header.
        items: The rows that have a picture, in their order.
        without_picture: How many rows have none; they are not asked.
        read_as_empty: How many rows have an option, question, hint or answer such as ``None`` or ``NA``, which is text
            here, and which pandas takes for an absent cell.
    """

    path: Path
    sha256: str
    md5: str
    columns: tuple[str, ...]
    items: tuple[Item, ...]
    without_picture: int
    read_as_empty: int
    places: Sequence[tuple[int, int]] = field(repr=False, default=())

    def pictures(self, item: Item, max_pixels: int) -> list[Any]:
        """Open the pictures that an item shows, upright and as RGB.

        Args:
            item: One of ``items``.
            max_pixels: Most pixels that a picture may have.

        Raises:
            PictureError: If one cannot be read.
        """
        from moslora.data.pictures import open_image

        try:
            return [open_image(source, max_pixels) for source in self._sources(item)]
        except PictureError as problem:
            raise PictureError(f"{self.path}, line {item.line}, index {item.index}: {problem}") from None

    def _sources(self, item: Item) -> list[bytes | Path]:
        start, size = self.places[item.shown_by]
        with self.path.open("rb") as file:
            file.seek(start)
            record = file.read(size)
        row = dict(zip(self.columns, split_record(record.decode("utf-8")), strict=False))
        if row.get("image"):
            return [base64.b64decode(text) for text in _as_list(row["image"])]
        return [_find(self.path, name) for name in _as_list(row["image_path"])]


def read_benchmark_file(path: Path) -> BenchmarkFile:
    """Read a benchmark's TSV, and check every row.

    Args:
        path: The file.

    Returns:
        Its rows; their pictures stay in the file.

    Raises:
        DataError: If a row is not what these files have: its line, index and fault.
    """
    if path.suffix.lower() != ".tsv" or not path.is_file():
        fault = "there is no such file" if not path.exists() else "it is not a .tsv file"
        raise DataError(str(path), [fault], "Give the TSV in which the benchmark is published.")
    reader = _Reader(path)
    with path.open("rb") as file:
        for line, start, record in reader.records(file):
            reader.add(line, start, record)
    return reader.finish()


class _Reader:
    """Collects rows and faults."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sha256, self.md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.columns: tuple[str, ...] = ()
        self.rows: list[tuple[str, int, dict[str, str], int, str]] = []
        self.shows: list[str] = []
        self.places: list[tuple[int, int]] = []
        self.faults: list[str] = []
        self.without_picture = 0

    def records(self, file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
        """Yield each record's first line (from 1), its first byte, and its bytes without the line break."""
        parts: list[bytes] = []
        at = start = size = 0
        first, in_quotes = 1, False
        for number, line in enumerate(file, 1):
            self.sha256.update(line)
            self.md5.update(line)
            if not parts:
                first, start, size = number, at, 0
            in_quotes = _ends_in_quotes(line, in_quotes)
            parts.append(line)
            at, size = at + len(line), size + len(line)
            if in_quotes and size <= LONGEST_RECORD:
                continue
            if in_quotes:
                self.faults.append(
                    f"line {first}: a cell that begins with a quotation mark has no closing one"
                )
                return
            yield first, start, b"".join(parts).rstrip(b"\r\n")
            parts = []
        if in_quotes:
            self.faults.append(f"line {first}: a cell that begins with a quotation mark has no closing one")

    def add(self, line: int, start: int, record: bytes) -> None:
        """Check one record and keep its text."""
        body = record.removeprefix(BOM) if not start else record
        try:
            cells = split_record(body.decode("utf-8"))
        except UnicodeDecodeError as problem:
            self.faults.append(f"line {line}: byte 0x{body[problem.start]:02x} is not UTF-8")
            return
        if not self.columns:
            self._take_header(line, cells)
            return
        if not body:
            return
        if len(cells) != len(self.columns):
            self.faults.append(f"line {line}: has {len(cells)} cells; the header has {len(self.columns)}")
            return
        row = {name: cell for name, cell in zip(self.columns, cells, strict=True) if cell}
        index = row.get("index", "")
        if not index:
            self.faults.append(f"line {line}: has no index")
            return
        try:
            pictures, refers_to = self._pictures_of(row)
        except PictureError as problem:
            self.faults.append(f"line {line}, index {quoted(index)}: {problem}")
            return
        text = {name: cell for name, cell in row.items() if name != "image"}
        self.rows.append((index, line, text, pictures, refers_to))
        shown = row.get("image") or row.get("image_path", "")
        self.shows.append(hashlib.sha256(shown.encode()).hexdigest()[:16])
        self.places.append((start, len(record)))

    def _take_header(self, line: int, cells: Sequence[str]) -> None:
        self.columns = tuple(cells)
        missing = [name for name in ("index", "question") if name not in cells]
        if not set(PICTURE_COLUMNS) & set(cells):
            missing.append("image (or image_path)")
        twice = sorted({name for name in cells if cells.count(name) > 1})
        faults = [f"line {line}: the header has no column {name}" for name in missing]
        faults += [f"line {line}: column {quoted(name)} appears twice in the header" for name in twice]
        if faults:
            advice = (
                "Columns are separated by tabs: index, question, image, answer, and A, B, C … for options."
            )
            raise DataError(str(self.path), faults, advice)

    def _pictures_of(self, row: Mapping[str, str]) -> tuple[int, str]:
        """Return how many pictures a row has, and the index that it refers to instead."""
        image = row.get("image")
        if "image" in self.columns and image is not None:
            pictures = _as_list(image)
            if len(pictures) == 1 and len(pictures[0]) <= LONGEST_REFERENCE:
                return 0, pictures[0]
            for text in pictures:
                _check_base64(text)
            return len(pictures), ""
        if "image" not in self.columns and "image_path" in row:
            names = _as_list(row["image_path"])
            for name in names:
                _find(self.path, name)
            return len(names), ""
        return 0, ""

    def finish(self) -> BenchmarkFile:
        """Resolve references, and report every fault."""
        positions: dict[str, int] = {}
        for position, (index, line, *_) in enumerate(self.rows):
            if index in positions:
                first = self.rows[positions[index]][1]
                self.faults.append(f"line {line}: index {quoted(index)} is also in line {first}")
            positions.setdefault(index, position)
        items = []
        for position, (index, line, cells, pictures, refers_to) in enumerate(self.rows):
            shown_by = position
            if refers_to:
                shown_by = positions.get(refers_to, -1)
                pictures = 0 if shown_by < 0 else self.rows[shown_by][3]
                if not pictures:
                    what = "is not in the file" if shown_by < 0 else "has no picture of its own"
                    place = f"line {line}, index {quoted(index)}"
                    self.faults.append(
                        f"{place}: shows the picture of index {quoted(refers_to)}, which {what}"
                    )
            elif not pictures:
                self.without_picture += 1
                continue
            items.append(Item(index, line, cells, pictures, shown_by, self.shows[shown_by]))
        if not self.faults and not items:
            self.faults.append("no row has a picture")
        if self.faults:
            advice = "Download the file again, or correct these rows; none was skipped."
            faults = self.faults
            raise DataError(str(self.path), faults[:SHOWN], advice, max(0, len(faults) - SHOWN))
        read_as_empty = sum(
            any(item.cells.get(name) in READ_AS_EMPTY for name in (*LETTERS, "question", "hint", "answer"))
            for item in items
        )
        return BenchmarkFile(
            self.path,
            self.sha256.hexdigest(),
            self.md5.hexdigest(),
            self.columns,
            tuple(items),
            self.without_picture,
            read_as_empty,
            self.places,
        )


# --- Cells --------------------------------------------------------------------------------------------------

# A cell in quotation marks may hold tabs, line breaks and doubled quotation marks; what follows it belongs to it.
CELL = re.compile(r'"((?:[^"]|"")*)"([^\t]*)|([^\t]*)', re.DOTALL)


def split_record(record: str) -> list[str]:
    """Split a record into its cells, as pandas does by default.

    Args:
        record: Its text, without the line break at its end.
    """
    if '"' not in record:
        return record.split("\t")
    cells, at = [], 0
    while True:
        found = CELL.match(record, at)
        assert found is not None, "it also matches nothing"
        quoted_part, rest, plain = found.groups()
        cells.append(plain if quoted_part is None else quoted_part.replace('""', '"') + rest)
        if found.end() >= len(record):
            return cells
        at = found.end() + 1


def _ends_in_quotes(line: bytes, in_quotes: bool) -> bool:
    """Return whether a cell in quotation marks is still open after a line."""
    if b'"' not in line:
        return in_quotes
    at = 0
    if not in_quotes:
        in_quotes = line.removeprefix(BOM).startswith(b'"')
        at = line.index(b'"') + 1 if in_quotes else 0
    while True:
        if in_quotes:
            at = line.find(b'"', at)
            if at < 0:
                return True
            if line.startswith(b'""', at):
                at += 2
                continue
            in_quotes, at = False, at + 1
        else:
            at = line.find(b'\t"', at)
            if at < 0:
                return False
            in_quotes, at = True, at + 2


def _as_list(cell: str) -> list[str]:
    """Return the texts of a cell that may hold a Python list of them."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise PictureError(f"{quoted(cell)} is not a list of pictures")
    return found


def _check_base64(text: str) -> None:
    try:
        binascii.a2b_base64(text, strict_mode=True)
    except (ValueError, binascii.Error) as problem:
        raise PictureError(f"its picture is not base64: {problem}") from None


def _find(file: Path, name: str) -> Path:
    """Return the picture that a name stands for: as it is, or beside the file."""
    for place in (
        file.parent / name,
        file.parent / "images" / name,
        file.parent / "images" / file.stem / name,
    ):
        if place.is_file():
            return place
    raise PictureError(f"there is no picture {quoted(name)} in {file.parent} or its folder images")
