"""Where prepared data are kept between starts, and for how long.

An entry is a folder named by a hash of all that it was made from: the content of the files, the settings, the tokenizer
and the code. It is written whole or not at all, by one process at a time, and never changed afterwards.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moslora.errors import BusyError, ExistsError
from moslora.files import clear_leftovers, locked, new_directory, write_text
from moslora.models.gguf import cache_folder

__all__ = ["data_cache", "entry", "key_of"]

RECORD = "entry.json"
LOCKS = "locks"
UNUSED = 30 * 24 * 3600.0  # seconds after which an entry that nobody used is removed
LIMIT = 100e9  # bytes of all entries; the least recently used ones go first
IN_USE = 24 * 3600.0  # an entry that was used so many seconds ago stays
POLL = 0.5


def data_cache() -> Path:
    """Return where prepared data are kept.

    ``$MOSLORA_CACHE/data``, else ``$HF_DATASETS_CACHE/moslora``, else ``$XDG_CACHE_HOME/moslora/data``, else
    ``~/.cache/moslora/data``.
    """
    root = os.environ.get("HF_DATASETS_CACHE")
    if root and not os.environ.get("MOSLORA_CACHE"):
        return Path(root).expanduser() / "moslora"
    return cache_folder() / "data"


def key_of(identity: Mapping[str, Any]) -> str:
    """Return the name of an entry.

    Args:
        identity: All that it is made from, ready for JSON. The code of this package is added.
    """
    text = json.dumps({**identity, "code": _code()}, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


@functools.cache
def _code() -> str:
    """Hash the modules that decide what an entry holds: another version of them makes another entry."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def entry(
    key: str,
    make: Callable[[Path], Mapping[str, Any]],
    check: Callable[[], None],
    waiting: Callable[[], None] = lambda: None,
) -> tuple[Path, dict[str, Any]]:
    """Return an entry, which is made if it is not there.

    Of several processes that want one entry, one makes it and the others wait for it.

    Args:
        key: From ``key_of``.
        make: Writes the entry's files into a folder, and returns what its record says.
        check: Called while waiting; raises if the run was asked to stop.
        waiting: Told once that another process is making it.

    Returns:
        The folder, and its record.
    """
    root = data_cache()
    place, lock = root / key, root / LOCKS / key
    told = False
    while True:
        record = _record(place)
        if record is not None:
            return place, record
        lock.mkdir(parents=True, exist_ok=True)
        try:
            with locked(lock, wait=False):
                record = _record(place)
                if record is None:
                    shutil.rmtree(place, ignore_errors=True)  # a damaged one
                    clear_leftovers(root)
                    _make(place, make)
                    _clean(root, place)
                    continue
                return place, record
        except BusyError:
            if not told:
                waiting()
                told = True
        check()
        time.sleep(POLL)


def _make(place: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    try:
        with new_directory(place) as folder:
            record = dict(make(folder))
            record["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_text(folder / RECORD, json.dumps(record))
    except ExistsError:
        pass  # where nothing can be locked, another process may have been faster


def _record(place: Path) -> dict[str, Any] | None:
    """Return the record of an entry whose files are all there, and note that it is used."""
    try:
        record: dict[str, Any] = json.loads((place / RECORD).read_text(encoding="utf-8"))
        if any((place / name).stat().st_size != size for name, size in record["files"].items()):
            return None
        os.utime(place / RECORD)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record


def _clean(root: Path, kept: Path) -> None:
    """Remove entries that nobody used for long, and the least recently used ones beyond the limit."""
    entries = []
    for place in root.iterdir():
        try:
            used = (place / RECORD).stat().st_mtime
            size = sum(path.stat().st_size for path in place.iterdir())
        except OSError:
            continue  # no entry, or one that goes just now
        entries.append((used, size, place))
    total, now = 0, time.time()
    for used, size, place in sorted(entries, reverse=True):
        total += size
        age = now - used
        if place != kept and (age > UNUSED or (total > LIMIT and age > IN_USE)):
            # What a process has mapped stays readable to it.
            shutil.rmtree(place, ignore_errors=True)
            total -= size
