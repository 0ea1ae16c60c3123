"""Which files, or which data set of the hub, a source means: a path, a pattern of paths, a folder or ``org/name``."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from moslora.data.faults import listed, quoted
from moslora.errors import DataError
from moslora.wording import did_you_mean, nearest

__all__ = ["SUFFIXES", "check_suffix", "load_table", "locate"]

# What can be read; ``moslora.data.files`` has a reader for each.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The hub's own layout names a single shard train-00000-of-00001.parquet, and one of several alike.
SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d+)-of-(?P<count>\d+)")

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


def check_suffix(path: Path) -> str:
    """Return a file's suffix, in lower case.

    Args:
        path: The file.

    Raises:
        DataError: If such files are not read; says why, and what to do.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        reason = f": {REFUSED[suffix]}" if suffix in REFUSED else ""
        hint = "" if reason else did_you_mean(suffix, SUFFIXES)
        fault = f"files with {suffix or 'no extension'} are not supported{reason}"
        raise DataError(str(path), [fault], f"Supported: {listed(SUFFIXES)}.{hint}")
    return suffix


def locate(source: str, split: str, subset: str | None = None) -> list[Path] | None:
    """Find the files that a source means.

    Args:
        source: A path, a pattern of paths such as ``data/*.jsonl``, a folder, or a hub id.
        split: Which split of a folder.
        subset: The folder in a folder that is called so is looked into, if there is one.

    Returns:
        The files, in the order of their names; None when ``source`` is a hub id.

    Raises:
        DataError: If there are none, or it is not clear which are meant.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if subset is not None and (path / subset).is_dir():
            path = path / subset
        return _files_of_split(path, split)
    if path.exists():
        return [path]
    if glob.has_magic(source):
        return _matching(source, path)
    looks_like_file = path.suffix.lower() in {*SUFFIXES, *REFUSED} or path.parent.is_dir()
    if DATASET_ID.fullmatch(source) and not looks_like_file:
        return None
    if not path.parent.is_dir():
        raise DataError(source, [f"there is no folder {path.parent}"], "Check the path.")
    name = nearest(path.name, [entry.name for entry in path.parent.iterdir()], 0.5)
    hint = f"Did you mean {path.parent / name}?" if name else "Check the path, or give a hub id org/name."
    raise DataError(source, ["there is no such file or folder"], hint)


def _matching(source: str, pattern: Path) -> list[Path]:
    """Return the files that a pattern of paths means, all of which must be readable."""
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True))  # noqa: PTH207 - absolute patterns too
    files = [path for path in found if not path.is_dir() and not path.name.startswith(".")]
    if not files:
        raise DataError(
            source, ["no file fits the pattern"], "Check the path; ** stands for folders at any depth."
        )
    for path in files:
        check_suffix(path)
    return files


def _files_of_split(folder: Path, split: str) -> list[Path]:
    readable = sorted(
        f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
    )
    of_split = [f for f in readable if f.stem == split or _shard_of(f, split)]
    if len(of_split) == 1 or (of_split and _is_whole(of_split, split)):
        return of_split
    if of_split:
        fault = f"{len(of_split)} files hold the split {split!r}: {listed(f.name for f in of_split)}"
        pattern = f"{folder}/{split}*{of_split[0].suffix}"
        raise DataError(
            str(folder), [fault], f"Name one of the files, join them, or name all by a pattern: {pattern}."
        )
    if readable:
        fault = f"no file is named after the split {split!r}; there are {listed(f.name for f in readable)}"
        raise DataError(
            str(folder), [fault], f"Name a file itself, or rename one to {split}{readable[0].suffix}."
        )
    fault = "the folder is empty" if not any(folder.iterdir()) else "no file in the folder can be read"
    raise DataError(str(folder), [fault], f"Put {split}.jsonl into it; supported: {listed(SUFFIXES)}.")


def _shard_of(file: Path, split: str) -> re.Match[str] | None:
    found = SHARD.fullmatch(file.stem)
    return found if found and found["split"] == split else None


def _is_whole(files: list[Path], split: str) -> bool:
    """Return whether files are all the shards of one split, each once."""
    shards = [_shard_of(file, split) for file in files]
    if not all(shards) or len({file.suffix for file in files}) > 1:
        return False
    numbers = sorted(int(shard["number"]) for shard in shards if shard)
    counts = {int(shard["count"]) for shard in shards if shard}
    return counts == {len(files)} and numbers == list(range(len(files)))


def load_table(source: str, split: str, limit: int | None, subset: str | None, revision: str | None) -> Any:
    """Load a data set of the hub; none of its code is run.

    Args:
        source: ``org/name``.
        split: Which split.
        limit: Rows at most; None for all.
        subset: Which of its configurations.
        revision: Branch, tag or commit; the newest by default.

    Returns:
        A ``datasets.Dataset``; ``with_pictures_stored`` gives its rows.

    Raises:
        DataError: If it cannot be loaded, or has no rows.
    """
    from datasets import load_dataset

    advice = "Check the name, the split and the network, or give a file; code of a data set is never run."
    wanted = split if limit is None else f"{split}[:{limit}]"
    try:
        table: Any = load_dataset(
            source, subset, split=wanted, **({} if revision is None else {"revision": revision})
        )
    except Exception as problem:  # the hub's client has dozens, from HTTP errors to missing configurations
        if "Config name is missing" in str(problem):
            advice = "Name one of its configurations, as data.subset=main."
        elif "BuilderConfig" in str(problem) and "not found" in str(problem):
            advice = "Correct data.subset, which names the configuration."
        fault = f"not on disk, and not loaded from the hub as a data set: {quoted(str(problem), 300)}"
        raise DataError(source, [fault], advice) from problem
    if not len(table):
        raise DataError(source, [f"the split {split!r} holds no rows"], advice)
    return table
