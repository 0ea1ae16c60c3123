"""Rows read, checked and interpreted by several processes, and written as examples.

Each part is read as the whole would be. What only the whole can say (which format the rows have, how many rows have a
fault) is put together from what each part found, so that errors are those of ``to_examples``, with every row counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moslora.data.columns import Unread, without_keys
from moslora.data.faults import Faults, kind_of
from moslora.data.files import Records
from moslora.data.naming import rename_columns
from moslora.data.shapes import Fits, check_format, interpret, refuse_faults
from moslora.data.stored.examples import write_examples
from moslora.data.stored.shards import Cut, Shard, read_shard, spool
from moslora.data.stored.workers import Workers
from moslora.errors import DataError

__all__ = ["Reading", "check_rows"]

KEPT = 100  # first rows whose keys are kept, to say what there is


@dataclass(frozen=True)
class Reading:
    """How rows are read.

    Attributes:
        format, columns, ignore, limit: The settings of ``data`` of these names.
        reasoning, system_turn: As for ``to_examples``.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    ignore: Sequence[str] = ()
    limit: int | None = None
    reasoning: str = "keep"
    system_turn: str = "keep"


@dataclass
class _Found:
    """What a part has.

    Attributes:
        rows: How many rows.
        first: The first of them, with its place.
        keys: The keys of the first ones.
        present: Which entries of ``ignore`` some row has.
        format: How its rows were interpreted; empty if they were not.
        fits: Which formats they fit.
        unreadable, misnamed, faults: First faults in words and their number, of reading, of naming columns, and of
            interpreting.
        unread: Keys that nobody reads.
    """

    rows: int = 0
    first: tuple[str, dict[str, Any]] | None = None
    keys: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    format: str = ""
    fits: Fits = field(default_factory=Fits)
    unreadable: tuple[Sequence[str], int] = ((), 0)
    misnamed: tuple[Sequence[str], int] = ((), 0)
    faults: tuple[Sequence[str], int] = ((), 0)
    unread: Unread = field(default_factory=Unread)


def check_rows(cut: Cut, reading: Reading, folder: Path, workers: Workers) -> dict[str, Any]:
    """Read a source, check every row, and write the examples.

    Args:
        cut: The source.
        reading: How it is read.
        folder: Where the examples are written, one file for each part.
        workers: The processes.

    Returns:
        What the record of the examples says: how many there are in each file, keys of rows, and which were ignored.

    Raises:
        DataError: If the source has faults, the same as if it were read at once.
    """
    check_format(reading.format)
    shards = list(cut.shards) or spool(cut, folder, reading.limit, workers.check)
    sizes = [shard.end - shard.start for shard in shards]
    is_guessed = reading.format == "auto"

    def work(name: str) -> Callable[[tuple[int, Shard], Callable[[], None]], _Found]:
        def one(part: tuple[int, Shard], _: Callable[[], None]) -> _Found:
            number, shard = part
            return _check(shard, cut, reading, name, folder / f"examples-{number:05}.arrow", not number)

        return one

    label = f"Reading {Path(cut.source).name}"
    parts = list(enumerate(shards))
    found = list(workers.run(label, work("" if is_guessed else reading.format), parts, sizes))
    cut.check_unchanged()
    _raise(cut, [one.unreadable for one in found], "Correct or remove these rows; none was skipped.")
    # Of the last part that is needed for a limit, faulty lines count as rows.
    if not any(one.rows for one in found):
        raise DataError(cut.source, ["the file holds no rows"], "Put at least one row into it.")
    _raise(
        cut,
        [one.misnamed for one in found],
        "Correct data.columns or these rows; none was skipped.",
    )
    name = reading.format
    if is_guessed:
        fits = Fits()
        for one in found:
            fits.merge(one.fits)
        place, row = next(one.first for one in found if one.first is not None)
        name = fits.decide(cut.source, place, row)
        # Parts that looked otherwise alone are interpreted as the whole is.
        again = [part for part, one in zip(parts, found, strict=True) if one.format != name]
        for part, one in zip(
            again, workers.run(label, work(name), again, [sizes[number] for number, _ in again]), strict=True
        ):
            found[part[0]] = one
    faults, unread = Faults(cut.source), Unread()
    for one in found:
        faults.merge(*one.faults)
        unread.merge(one.unread)
    refuse_faults(faults, unread, name)
    for shard in shards:
        if shard.kind == "spooled":
            Path(shard.path).unlink()
    return {
        "format": name,
        "counts": [one.rows for one in found],
        "keys": sorted(found[0].keys),
        "present": sorted(set().union(*(one.present for one in found))),
    }


def _keys(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names that ``idle_entry`` looks for in rows."""
    inner = (
        f"{column}.{name}"
        for row in rows
        for column, turns in row.items()
        for turn in (turns if isinstance(turns, list) else ())
        if isinstance(turn, dict)
        for name in turn
    )
    return {*(str(name) for row in rows for name in row), *inner}


def _raise(cut: Cut, parts: Sequence[tuple[Sequence[str], int]], advice: str) -> None:
    faults = Faults(cut.source)
    for first, count in parts:
        faults.merge(first, count)
    faults.raise_if_any(advice)


def _check(shard: Shard, cut: Cut, reading: Reading, name: str, out: Path, keeps: bool) -> _Found:
    """Read, check and write a part; ``name`` is its format, or empty to look for it."""
    found, faults = _Found(), Faults(cut.source)
    rows, places = [], []
    for place, row in read_shard(shard, faults, cut.table):
        if isinstance(row, dict):
            rows.append(row)
            places.append(place)
        else:
            faults.add(place, f"is {kind_of(row)}; expected an object with named fields")
    found.rows = len(rows)
    found.unreadable = (faults.first, faults.count)
    if faults.count or not rows:
        write_examples(out, [])
        return found
    records, found.present = without_keys(Records(rows, places, cut.source, cut.sha256), reading.ignore)
    found.keys = _keys(records.rows[:KEPT]) if keeps else set()
    try:
        records = rename_columns(records, reading.columns)
    except DataError as problem:
        found.misnamed = (problem.faults, len(problem.faults) + problem.further)
        return found
    found.first = (records.places[0], records.rows[0])
    is_guessed = reading.format == "auto"
    if is_guessed:
        found.fits.add(records)
        alone = found.fits.counts.most_common(1)
        name = name or (alone[0][0] if alone and found.fits.ambiguous is None else "")
    found.format = name
    if not name:
        return found
    examples, faults, found.unread = interpret(
        records, name, is_guessed, reading.reasoning, reading.system_turn
    )
    found.faults = (faults.first, faults.count)
    if not faults.count and not found.unread:
        write_examples(out, examples)
    return found
