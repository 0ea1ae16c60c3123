"""Files cut into parts that several processes read, each with the places that the whole has."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from moslora.data.faults import Faults
from moslora.data.files import BOM, FILE_READERS, check_file, read_json_lines
from moslora.data.pictures import with_pictures_stored
from moslora.errors import DataError

__all__ = ["Cut", "Shard", "cut_file", "cut_table", "read_shard", "spool"]

PART = 8 << 20  # bytes of a part at most, about
FEW, SMALL = (
    16,
    1 << 20,
)  # parts of a smaller file, of so many bytes at least, so that all processes have work
ROWS = 4096  # rows of a part of a table
LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Shard:
    """A part of a source.

    Attributes:
        path: The file; empty for a table.
        kind: ``"lines"`` of JSON, ``"spooled"`` rows with their places, ``"parquet"``, or ``"table"``.
        start: The first byte of lines, or the first row.
        end: The byte after the last one, or the row after the last one.
        first: The number of the first line.
    """

    path: str
    kind: str
    start: int
    end: int
    first: int = 1


@dataclass(frozen=True)
class Cut:
    """A source, cut into parts.

    Attributes:
        source: The file or hub id.
        sha256: Of the content.
        stamp: What tells that the file was changed since; None for a table.
        shards: The parts; empty where the whole must be read first, by ``spool``.
        name: What its places begin with; empty if it is alone.
        table: The table that parts of kind ``"table"`` are of.
    """

    source: str
    sha256: str
    stamp: tuple[int, ...] | None
    shards: Sequence[Shard]
    name: str = ""
    table: Any = None

    def check_unchanged(self) -> None:
        """Refuse a file that was changed while it was read.

        Raises:
            DataError: If it was.
        """
        if self.stamp is not None and self.stamp != _stamp(Path(self.source)):
            raise DataError(
                self.source, ["it was changed while it was read"], "Start again once it is written."
            )


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def cut_file(path: Path, limit: int | None, check: Callable[[], None], name: str = "") -> Cut:
    """Hash a file, and find where its parts begin.

    Args:
        path: The file.
        limit: Rows at most; None for all.
        check: Called now and then; raises if the run was asked to stop.
        name: What its places begin with.

    Raises:
        DataError: If it is empty or of a kind that is not read.
        OSError: If it cannot be read.
    """
    suffix, stamp = check_file(path), _stamp(path)
    hashed, lines = hashlib.sha256(), []
    size, start, first = 0, 0, 1
    part = min(PART, max(SMALL, stamp[0] // FEW))
    with path.open("rb") as file:
        while block := file.read(part):
            check()
            hashed.update(block)
            if suffix in LINES and (last := block.rfind(b"\n")) >= 0:
                end = size + last + 1
                lines.append(Shard(str(path), "lines", start, end, first))
                start, first = end, first + block.count(b"\n")
            size += len(block)
    if not size:
        raise DataError(str(path), ["the file is empty"], "Put at least one row into it.")
    if suffix in LINES:
        if start < size:
            lines.append(Shard(str(path), "lines", start, size, first))
        shards = lines if limit is None else _first_lines(lines, limit)
    elif suffix == ".parquet":
        shards = _cut_parquet(path, limit)
    else:
        shards = []
    return Cut(str(path), hashed.hexdigest(), stamp, shards, name)


def _first_lines(shards: Sequence[Shard], limit: int) -> list[Shard]:
    """Return parts that end after so many lines that are not blank."""
    kept: list[Shard] = []
    for shard in shards:
        at = shard.start
        for line in _lines_of(shard):
            if not limit:
                return [*kept, replace(shard, end=at)] if at > shard.start else kept
            body = line if at else line.removeprefix(BOM)
            at += len(line)
            limit -= bool(body.strip())
        kept.append(shard)
    return kept


def _cut_parquet(path: Path, limit: int | None) -> list[Shard]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
    except Exception as problem:  # pyarrow raises a dozen types; each means that the file cannot be read
        raise DataError(
            str(path),
            [f"not readable as Parquet: {problem}"],
            "Correct or remove these rows; none was skipped.",
        ) from problem
    shards, row = [], 0
    for group, size in enumerate(sizes):
        count = size if limit is None else min(size, limit - row)
        if count > 0:
            shards.append(Shard(str(path), "parquet", row, row + count, group))
        row += size
    return shards


def cut_table(table: Any, source: str, sha256: str) -> Cut:
    """Cut a data set of the hub into parts.

    Args:
        table: A ``datasets.Dataset``.
        source: Its name.
        sha256: Of its content.
    """
    shards = [Shard("", "table", at, min(at + ROWS, len(table)), at + 1) for at in range(0, len(table), ROWS)]
    return Cut(source, sha256, None, shards, table=table)


def spool(cut: Cut, folder: Path, limit: int | None, check: Callable[[], None]) -> list[Shard]:
    """Read a file that must be read from its start, and write its rows into parts.

    Args:
        cut: The file.
        folder: Where the parts are written.
        limit: Rows at most; None for all.
        check: Called now and then; raises if the run was asked to stop.

    Raises:
        DataError: If the file has faults.
    """
    path, faults = Path(cut.source), Faults(cut.source)
    shards: list[Shard] = []
    part: Any = None
    try:
        with path.open("rb") as file:
            for row in islice(FILE_READERS[path.suffix.lower()](file, faults), limit):
                if part is None or part.tell() > PART:
                    check()
                    if part is not None:
                        part.close()
                    place = folder / f"rows-{len(shards):05}.jsonl"
                    part = place.open("wb")
                    shards.append(Shard(str(place), "spooled", 0, 0))
                part.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    finally:
        if part is not None:
            part.close()
    faults.raise_if_any("Correct or remove these rows; none was skipped.")
    return [replace(shard, end=os.path.getsize(shard.path)) for shard in shards]  # noqa: PTH202


def read_shard(shard: Shard, faults: Faults, table: Any = None) -> Iterator[tuple[str, Any]]:
    """Read the rows of a part, as the reader of the whole does.

    Args:
        shard: The part.
        faults: Told of what cannot be read.
        table: The table that it is of.

    Yields:
        The place and the value of each row.
    """
    if shard.kind == "lines":
        yield from read_json_lines(_lines_of(shard), faults, shard.first, shard.start)
    elif shard.kind == "spooled":
        with Path(shard.path).open("rb") as file:
            for line in file:
                place, value = json.loads(line)
                yield place, value
    elif shard.kind == "table":
        rows = with_pictures_stored(table.select(range(shard.start, shard.end)))
        for number, row in enumerate(rows, shard.first):
            yield f"row {number}", dict(row)
    else:
        yield from _read_parquet(shard, faults)


def _lines_of(shard: Shard) -> Iterator[bytes]:
    with Path(shard.path).open("rb") as file:
        file.seek(shard.start)
        left = shard.end - shard.start
        if left <= 2 * PART:
            yield from io.BytesIO(file.read(left))
            return
        while left > 0 and (line := file.readline()):  # one line of many megabytes
            left -= len(line)
            yield line


def _read_parquet(shard: Shard, faults: Faults) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    number = shard.start
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as file:
            for batch in file.iter_batches(batch_size=1024, row_groups=[shard.first]):
                for row in batch.to_pylist():
                    if number == shard.end:
                        return
                    number += 1
                    yield f"row {number}", row
    except Exception as problem:  # as above
        faults.add(f"after row {number}" if number else "", f"not readable as Parquet: {problem}")
