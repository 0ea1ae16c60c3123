"""Rows of data files and hub data sets; a bad row is named in an error, and never skipped silently.

file, folder or hub id ──read_records──▶ Records ──to_examples──▶ Examples ──split_heldout──▶ train, held out
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from moslora.bounded import kind_of_file
from moslora.data.faults import Faults, kind_of, listed, quoted
from moslora.data.pictures import with_pictures_stored
from moslora.data.strict_json import parse_json
from moslora.errors import DataError, UsageError
from moslora.wording import did_you_mean, nearest

_field_limit = threading.Lock()

__all__ = ["FILE_READERS", "Records", "read_records"]

DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BOM = b"\xef\xbb\xbf"

# Suffixes that are known and not supported: why, and what to do instead.
REFUSED = {
    ".gz": "it is compressed, and line numbers and its hash would be those of other bytes: run gunzip on it",
    ".bz2": "it is compressed: run bunzip2 on it",
    ".xz": "it is compressed: run unxz on it",
    ".zst": "it is compressed: run unzstd on it",
    ".zip": "it is an archive: unpack it",
    ".tar": "it is an archive: unpack it",
    ".xlsx": "spreadsheets have no single table: save the sheet as CSV",
    ".txt": 'plain text has no rows: write one {"text": …} per line into a .jsonl file',
    ".arrow": "save it as Parquet: dataset.to_parquet(…)",
    ".pkl": "unpickling a file runs the code in it: save the rows as JSONL",
    ".pickle": "unpickling a file runs the code in it: save the rows as JSONL",
}


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


def _read_json_lines(file: BinaryIO, faults: Faults) -> _Rows:
    start = 0
    for number, raw in enumerate(file, 1):
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
    raw = file.read()
    body = raw.removeprefix(BOM)
    try:
        text = _decode(body, len(raw) - len(body))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}


def read_records(
    source: str, split: str = "train", limit: int | None = None, subset: str | None = None
) -> Records:
    """Read the rows of a file, a folder or a hub data set.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file; a folder with
            one such file named after ``split``; or a hub id ``org/name``, when no such path exists.
        split: Which split of a folder or hub data set.
        limit: Read at most this many rows (at least 1); all by default.
        subset: Which configuration of a hub data set; of a folder the folder in it that is called so, if there is one.

    Returns:
        At least one row.

    Raises:
        DataError: If the source is missing, unreadable, empty, or holds a row that is not an object.
        UsageError: If ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit} reads nothing; give 1 or more, or leave it out.")
    try:
        path = _locate(source, split, subset)
        if path is None:
            return _read_hub(source, split, limit, subset)
        return _read_file(path, limit)
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise DataError(
            source, [f"cannot be read: {reason}"], "Check the path and its permissions."
        ) from problem


def _read_file(path: Path, limit: int | None) -> Records:
    suffix = path.suffix.lower()
    if suffix not in FILE_READERS:
        reason = f": {REFUSED[suffix]}" if suffix in REFUSED else ""
        hint = "" if reason else did_you_mean(suffix, FILE_READERS)
        fault = f"files with {suffix or 'no extension'} are not supported{reason}"
        raise DataError(str(path), [fault], f"Supported: {listed(FILE_READERS)}.{hint}")
    if kind := kind_of_file(path):
        raise DataError(
            str(path), [f"it is {kind}, not a file"], "Write the rows into a file, and name that."
        )
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


def _locate(source: str, split: str, subset: str | None) -> Path | None:
    """Return the file to read, or None when ``source`` is a hub id."""
    path = Path(source).expanduser()
    if path.is_dir():
        if subset is not None and (path / subset).is_dir():
            path = path / subset
        return _file_of_split(path, split)
    if path.exists():
        return path
    looks_like_file = path.suffix.lower() in {*FILE_READERS, *REFUSED} or path.parent.is_dir()
    if DATASET_ID.fullmatch(source) and not looks_like_file:
        return None
    if not path.parent.is_dir():
        raise DataError(source, [f"there is no folder {path.parent}"], "Check the path.")
    name = nearest(path.name, [entry.name for entry in path.parent.iterdir()], 0.5)
    hint = f"Did you mean {path.parent / name}?" if name else "Check the path, or give a hub id org/name."
    raise DataError(source, ["there is no such file or folder"], hint)


def _file_of_split(folder: Path, split: str) -> Path:
    # The hub's own layout names a single shard train-00000-of-00001.parquet.
    shard = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
    readable = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in FILE_READERS and not f.name.startswith(".")
    )
    of_split = [f for f in readable if shard.fullmatch(f.stem)]
    if len(of_split) == 1:
        return of_split[0]
    if of_split:
        fault = f"{len(of_split)} files hold the split {split!r}: {listed(f.name for f in of_split)}"
        raise DataError(str(folder), [fault], "Name one of the files, or join them.")
    if readable:
        fault = f"no file is named after the split {split!r}; there are {listed(f.name for f in readable)}"
        raise DataError(
            str(folder), [fault], f"Name a file itself, or rename one to {split}{readable[0].suffix}."
        )
    fault = "the folder is empty" if not any(folder.iterdir()) else "no file in the folder can be read"
    raise DataError(str(folder), [fault], f"Put {split}.jsonl into it; supported: {listed(FILE_READERS)}.")


def _read_hub(source: str, split: str, limit: int | None, subset: str | None) -> Records:
    from datasets import load_dataset

    advice = "Check the name, the split and the network, or give a file; code of a data set is never run."
    try:
        table = load_dataset(source, subset, split=split if limit is None else f"{split}[:{limit}]")
        rows = [dict(row) for row in with_pictures_stored(table)]
    except Exception as problem:  # the hub's client has dozens, from HTTP errors to missing configurations
        fault = f"not on disk, and not loaded from the hub as a data set: {quoted(str(problem), 300)}"
        raise DataError(source, [fault], advice) from problem
    if not rows:
        raise DataError(source, [f"the split {split!r} holds no rows"], advice)
    sha256 = hashlib.sha256()
    for row in rows:
        sha256.update(json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return Records(rows, [f"row {n}" for n in range(1, len(rows) + 1)], source, sha256.hexdigest())
