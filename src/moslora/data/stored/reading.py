"""Sources read into the cache: each file is checked once, and found there by the hash of its content ever after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moslora.data.faults import SHOWN
from moslora.data.files import (
    Records,
    check_reading,
    hash_rows,
    hash_together,
    more_files,
    names_of,
    no_revision,
    unreadable,
)
from moslora.data.finding import load_table, locate
from moslora.data.pictures import with_pictures_stored
from moslora.data.stored.cache import entry, key_of
from moslora.data.stored.checking import Reading, check_rows
from moslora.data.stored.examples import Stored, StoredExamples
from moslora.data.stored.shards import Cut, cut_file, cut_table
from moslora.data.stored.workers import Workers
from moslora.errors import DataError, UsageError

__all__ = ["Place", "large", "read_stored"]

LARGE = 8 << 20  # bytes of files from which on their examples are not held in memory
LARGE_TABLE = 5000  # rows of a data set of the hub
PACKED = 4  # how many times larger Parquet is when it is read

# Where data are: source, split, subset, revision.
Place = tuple[str, str, str | None, str | None]


def large(place: Place, limit: int | None) -> bool:
    """Return whether a source has too many rows to hold them in memory, as far as a look at its size can tell.

    Args:
        place: Where it is.
        limit: Rows at most; None for all.
    """
    if limit is not None and limit <= LARGE_TABLE:
        return False
    source, split, subset, revision = place
    try:
        paths = locate(source, split, subset)
        if paths is None:
            return len(load_table(source, split, limit, subset, revision)) > LARGE_TABLE
        sizes = [path.stat().st_size * (PACKED if path.suffix.lower() == ".parquet" else 1) for path in paths]
    except (DataError, OSError, ValueError):
        return False  # whoever reads it says what is wrong
    return sum(sizes) > LARGE


def read_stored(
    place: Place, reading: Reading, workers: Workers, name: str = ""
) -> tuple[StoredExamples, Records, set[str]]:
    """Read a source, or find it read in the cache.

    Args:
        place: Where it is.
        reading: How it is read.
        workers: The processes that read it.
        name: What its places begin with; empty if it is alone.

    Returns:
        The examples; the source with its hash and one row that has every key of its first rows; and which entries of
        ``ignore`` some row has.

    Raises:
        DataError: As ``read_records`` and ``to_examples``.
        UsageError: If several files of it have faults, or a file has a revision.
    """
    import numpy

    check_reading(reading.limit)
    source, split, subset, revision = place
    try:
        paths = locate(source, split, subset)
        if paths is None:
            cuts = [_cut_hub(place, reading.limit)]
            found = [_read(cuts[0], reading, workers, name)]
        else:
            if revision is not None:
                raise UsageError(no_revision(source, revision))
            cuts, found = _read_files(paths, reading, workers, name)
    except OSError as problem:
        raise unreadable(source, problem) from problem
    _check_formats(cuts, [record["format"] for _, record in found])
    parts = [stored for stored, _ in found]
    examples = StoredExamples(parts, numpy.arange(sum(sum(part.counts) for part in parts)), workers)
    keys = dict.fromkeys(key for _, record in found for key in record["keys"])
    sha256 = hash_together([cut.sha256 for cut in cuts])
    told = cuts[0].source if len(cuts) == 1 else source
    present = {key for _, record in found for key in record["present"]}
    return examples, Records([keys], ["row 1"], told, sha256), present


def _read_files(
    paths: Sequence[Path], reading: Reading, workers: Workers, name: str
) -> tuple[list[Cut], list[tuple[Stored, dict[str, Any]]]]:
    names = [""] if len(paths) == 1 else names_of(paths)
    cuts: list[Cut] = []
    found: list[tuple[Stored, dict[str, Any]]] = []
    problems = []
    left = reading.limit
    for path, own in zip(paths, names, strict=True):
        if left is not None and left <= 0:
            break
        try:
            cut = cut_file(path, left, workers.check)
            stored = _read(cut, replace(reading, limit=left), workers, ", ".join(filter(None, (name, own))))
        except DataError as problem:
            problems.append(problem)
            continue
        cuts.append(cut)
        found.append(stored)
        left = None if left is None else left - sum(stored[0].counts)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError("\n".join(map(str, problems[:SHOWN])) + more_files(len(problems)))
    return cuts, found


def _read(cut: Cut, reading: Reading, workers: Workers, name: str) -> tuple[Stored, dict[str, Any]]:
    suffix = "" if cut.stamp is None else Path(cut.source).suffix.lower()
    identity = {"what": "examples", "sha256": cut.sha256, "suffix": suffix, **asdict(reading)}
    key = key_of(identity)
    folder, record = entry(
        key,
        lambda folder: check_rows(cut, reading, folder, workers),
        workers.check,
        lambda: workers.display.say(f"Another process reads {cut.source}; waiting for it."),
    )
    return Stored(key, folder, record["counts"], name), record


def _cut_hub(place: Place, limit: int | None) -> Cut:
    source, split, subset, revision = place
    table = load_table(source, split, limit, subset, revision)
    return cut_table(table, source, hash_rows(with_pictures_stored(table)))


def _check_formats(cuts: Sequence[Cut], formats: Sequence[str]) -> None:
    """Refuse files of one source whose rows have different shapes."""
    for cut, format in zip(cuts, formats, strict=True):
        if format != formats[0]:
            raise DataError(
                cut.source,
                [f"its rows have format {format!r}, those of {cuts[0].source} {formats[0]!r}"],
                "Name the files apart, each as an item of data.train, or one data.format for all.",
            )
