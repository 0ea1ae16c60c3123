"""Rows of data files and hub data sets; a bad row is named in an error, and never skipped silently.

file, folder or hub id ──read_records──▶ Records ──to_examples──▶ Examples ──split_heldout──▶ train, held out
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from moslora.bounded import kind_of_file
from moslora.data.faults import SHOWN, Faults, kind_of, listed, quoted
from moslora.data.finding import check_suffix, load_table, locate
from moslora.data.pictures import with_pictures_stored
from moslora.data.strict_json import parse_json
from moslora.errors import DataError, UsageError

_field_limit = threading.Lock()

__all__ = [
    "FILE_READERS",
    "Records",
    "check_file",
    "check_reading",
    "hash_rows",
    "hash_together",
    "more_files",
    "names_of",
    "no_revision",
    "read_json_lines",
    "read_records",
    "unreadable",
]

BOM = b"\xef\xbb\xbf"
BLOCK = 1 << 20  # bytes


@dataclass(frozen=True)
class Records:
    """Rows as a file holds them, not yet interpreted.

    Attributes:
        rows: Column name to value, one mapping per row.
        places: Where each row stands, e.g. ``"line 17"`` (JSONL, CSV) or ``"row 17"``; both count from 1.
        source: The file that was read, or the hub id.
        sha256: Hash of the file's bytes; of the rows as JSON for a hub id.
    """

    rows: list[dict[str, Any]]
    places: list[str]
    source: str
    sha256: str


_Rows = Iterator[tuple[str, Any]]  # place, value


def _decode(raw: bytes, start: int) -> str:
    """Decode UTF-8 that stands ``start`` bytes into its file."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        offset = start + problem.start
        raise ValueError(f"byte 0x{raw[problem.start]:02x} at offset {offset} is not UTF-8") from None


def read_json_lines(lines: Iterable[bytes], faults: Faults, first: int = 1, start: int = 0) -> _Rows:
    """Read lines of JSON.

    Args:
        lines: The lines, each with its end.
        faults: Told of lines that are none.
        first: Number of the first line in its file.
        start: Where it begins, in bytes.

    Yields:
        The place and the value of each line that is not blank.
    """
    for number, raw in enumerate(lines, first):
        body = raw.removeprefix(BOM) if number == 1 else raw
        try:
            line = _decode(body, start + len(raw) - len(body))
            if line.strip():
                yield f"line {number}", parse_json(line)
        except ValueError as problem:
            looks_whole = number == 1 and body.strip() in (b"[", b"{")
            hint = "; the file looks like one JSON document: name it .json" if looks_whole else ""
            faults.add(f"line {number}", f"{problem}{hint}")
        start += len(raw)


def _read_json(file: BinaryIO, faults: Faults) -> _Rows:
    raw = file.read()
    body = raw.removeprefix(BOM)
    try:
        text = _decode(body, len(raw) - len(body))
        value = parse_json(text) if text.strip() else []
    except ValueError as problem:
        is_lines = "Extra data" in str(problem) and body.lstrip().startswith(b"{")
        hint = "; the file looks like JSON Lines: name it .jsonl" if is_lines else ""
        faults.add("", f"{problem}{hint}")
        return
    rows = value.get("data") if isinstance(value, dict) else value
    if isinstance(rows, list):
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
    else:
        what = f"an object with keys {listed(value)}" if isinstance(value, dict) else kind_of(value)
        faults.add("", f'the document is {what}; expected a list of objects, or {{"data": [...]}}')


def _read_csv(file: BinaryIO, faults: Faults, delimiter: str = ",") -> _Rows:
    text = _text_lines(file)
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        rows = _of_any_length(reader)
        header = next((row for row in rows if row), [])
        if problem := _header_fault(header, delimiter):
            faults.add(f"line {max(reader.line_num, 1)}", problem)
            return
        line = reader.line_num + 1
        for cells in rows:
            if len(cells) == len(header):
                yield f"line {line}", dict(zip(header, cells, strict=True))
            elif cells:
                faults.add(f"line {line}", f"has {len(cells)} fields; the header has {len(header)}")
            line = reader.line_num + 1
    except csv.Error as problem:
        faults.add(f"line {reader.line_num}", f"{problem}")
    except ValueError as problem:
        faults.add("", f"{problem}")


def _text_lines(file: BinaryIO) -> Iterator[str]:
    """Yield a file's lines with their ends as they are, without holding the file in memory."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from text
    except UnicodeDecodeError:
        file.seek(0)
        decoder = codecs.getincrementaldecoder("utf-8")()
        start, block = 0, b"x"
        while block:
            block = file.read(BLOCK)
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as problem:
                offset = start - pending + problem.start
                byte = problem.object[problem.start]
                raise ValueError(f"byte 0x{byte:02x} at offset {offset} is not UTF-8") from None
            start += len(block)
        raise
    finally:
        with contextlib.suppress(ValueError):  # of a reader that was not read to its end, the file is closed
            text.detach()


def _of_any_length(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield rows with fields of any length; the limit is the process's, so it is another only while a row is read."""
    while True:
        with _field_limit:
            limit = csv.field_size_limit(2**31 - 1)  # the module's 128 KiB are less than one long document
            try:
                row = next(reader, None)
            finally:
                csv.field_size_limit(limit)
        if row is None:
            return
        yield row


def _header_fault(header: list[str], delimiter: str) -> str:
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        return f"column {twice[0]!r} appears twice in the header"
    if len(header) == 1 and (other := next((c for c in ",;\t|" if c != delimiter and c in header[0]), "")):
        way = {"\t": "name the file .tsv", ",": "name the file .csv"}.get(other, "save it with commas")
        return f"the header is one column {quoted(header[0])}; the separator seems to be {other!r}: {way}"
    return ""


def _read_tsv(file: BinaryIO, faults: Faults) -> _Rows:
    return _read_csv(file, faults, delimiter="\t")


def _read_parquet(file: BinaryIO, faults: Faults) -> _Rows:
    import pyarrow.parquet  # type: ignore[import-untyped]

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except Exception as problem:  # pyarrow raises a dozen types; each means that the file cannot be read
        faults.add(f"after row {number}" if number else "", f"not readable as Parquet: {problem}")


FILE_READERS: dict[str, Callable[[BinaryIO, Faults], _Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def read_records(
    source: str,
    split: str = "train",
    limit: int | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> Records:
    """Read the rows of files or of a hub data set.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; a pattern of such files;
            a folder with one such file named after ``split``, or all its shards; or a hub id ``org/name``, when no such
            path exists.
        split: Which split of a folder or hub data set.
        limit: Read at most this many rows (at least 1); all by default.
        subset: Which configuration of a hub data set; of a folder the folder in it that is called so, if there is one.
        revision: Branch, tag or commit of a hub data set.

    Returns:
        At least one row. Places of several files begin with the file's name.

    Raises:
        DataError: If the source is missing, unreadable, empty, or holds a row that is not an object.
        UsageError: If ``limit`` is below 1, or a file has a revision.
    """
    check_reading(limit)
    try:
        paths = locate(source, split, subset)
        if paths is None:
            return _read_hub(source, split, limit, subset, revision)
        if revision is not None:
            raise UsageError(no_revision(source, revision))
        if len(paths) == 1:
            return _read_file(paths[0], limit)
        return _read_files(paths, source, limit)
    except OSError as problem:
        raise unreadable(source, problem) from problem


def check_reading(limit: int | None) -> None:
    """Refuse a limit that reads nothing.

    Args:
        limit: Rows at most.

    Raises:
        UsageError: If it does.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} reads nothing; give 1 or more, or leave it out.")


def no_revision(source: str, revision: str) -> str:
    """Return why a file cannot have a revision."""
    return f"data.revision={revision!r} does not apply to {source}: only data sets of the hub have revisions."


def unreadable(source: str, problem: OSError) -> DataError:
    """Return what is said of a file that the system does not give."""
    reason = problem.strerror or str(problem)
    return DataError(source, [f"cannot be read: {reason}"], "Check the path and its permissions.")


def _read_files(paths: Sequence[Path], source: str, limit: int | None) -> Records:
    """Read several files as one; all of them are read before one is refused."""
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    hashes, problems = [], []
    names = names_of(paths)
    for path, name in zip(paths, names, strict=True):
        left = None if limit is None else limit - len(rows)
        if left == 0:
            break
        try:
            part = _read_file(path, left)
        except DataError as problem:
            problems.append(problem)
            continue
        rows += part.rows
        places += [f"{name}, {place}" for place in part.places]
        hashes.append(part.sha256)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError("\n".join(map(str, problems[:SHOWN])) + more_files(len(problems)))
    return Records(rows, places, source, hash_together(hashes))


def names_of(paths: Sequence[Path]) -> list[str]:
    """Return what each of several files is called in places: its name, or its path where two have one name."""
    names = Counter(path.name for path in paths)
    return [path.name if names[path.name] == 1 else str(path) for path in paths]


def more_files(count: int) -> str:
    """Return how many files beyond those shown have faults."""
    return f"\nand {count - SHOWN} more files with faults" if count > SHOWN else ""


def check_file(path: Path) -> str:
    """Return the suffix of a file that can be read.

    Args:
        path: The file.

    Raises:
        DataError: If it is of another kind.
    """
    suffix = check_suffix(path)
    if kind := kind_of_file(path):
        raise DataError(
            str(path), [f"it is {kind}, not a file"], "Write the rows into a file, and name that."
        )
    return suffix


def _read_file(path: Path, limit: int | None) -> Records:
    suffix = check_file(path)
    faults = Faults(str(path))
    rows: list[dict[str, Any]] = []
    places = []
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not file.tell():
            raise DataError(str(path), ["the file is empty"], "Put at least one row into it.")
        file.seek(0)
        for place, row in islice(FILE_READERS[suffix](file, faults), limit):
            if isinstance(row, dict):
                rows.append(row)
                places.append(place)
            else:
                faults.add(place, f"is {kind_of(row)}; expected an object with named fields")
    faults.raise_if_any("Correct or remove these rows; none was skipped.")
    if not rows:
        raise DataError(str(path), ["the file holds no rows"], "Put at least one row into it.")
    return Records(rows, places, str(path), sha256)


def _read_hub(
    source: str, split: str, limit: int | None, subset: str | None, revision: str | None
) -> Records:
    table = load_table(source, split, limit, subset, revision)
    rows = [dict(row) for row in with_pictures_stored(table)]
    return Records(rows, [f"row {n}" for n in range(1, len(rows) + 1)], source, hash_rows(rows))


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a hash of rows, as JSON.

    Args:
        rows: Of a data set.
    """
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return sha256.hexdigest()


def hash_together(hashes: Sequence[str]) -> str:
    """Return the hash of several files together; of one file its own.

    Args:
        hashes: Of each file, in order.
    """
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
