"""Where an adapter came from: base, data, task and the adapter that it started from, in a small file beside it.

The file goes along when an adapter is exported into a directory. It names the tensors that it was written for, so that
an adapter that was trained further elsewhere, and saved to the same place, is not told an older one's story.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moslora.adapters.formats.native import START
from moslora.bounded import read_json
from moslora.files import write_text
from moslora.terminal import warn
from moslora.wording import first_line

__all__ = ["LINEAGE", "describe_lineage", "hash_files", "keep_lineage", "lineage_of"]

LINEAGE = "moslora_lineage.json"
SCHEMA = 1
MOST_LEVELS = 20  # of starts of starts that are told


def keep_lineage(folder: Path, story: Mapping[str, Any]) -> None:
    """Write an adapter's lineage beside it.

    Args:
        folder: The adapter's directory, its tensors written.
        story: ``task``, ``base``, ``data`` and what else is known, ready for JSON; ``start`` is the lineage of the
            adapter that it was trained from.

    Raises:
        OSError: If it cannot be written.
    """
    whole = {"schema_version": SCHEMA, **story, "of": _digest(folder)}
    write_text(folder / LINEAGE, json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def lineage_of(adapter: Path) -> dict[str, Any] | None:
    """Read what an adapter's lineage is.

    Args:
        adapter: Its directory, or a file.

    Returns:
        What ``keep_lineage`` was given; None where none was kept, or for other tensors than those that lie there, and
        with a warning where it cannot be read.
    """
    path = adapter / LINEAGE
    try:
        story = read_json(path) if path.is_file() else None
    except (OSError, ValueError) as error:
        warn(f"{path} cannot be read, so where this adapter came from is not known: {first_line(error)}")
        return None
    if not isinstance(story, dict) or story.get("of") != _digest(adapter):
        return None
    return {key: value for key, value in story.items() if key not in ("of", "schema_version")}


def describe_lineage(story: Mapping[str, Any]) -> Iterator[str]:
    """Yield a lineage in sentences, the newest training first.

    Args:
        story: As ``lineage_of`` returns it.
    """
    current: Any = story
    for level in range(MOST_LEVELS):
        if not isinstance(current, Mapping) or not current:
            return
        base, start = current.get("base"), current.get("start")
        name = base.get("name") if isinstance(base, Mapping) else None
        loss = f", {current['loss']}" if current.get("loss") else ""
        steps = f" for {current['steps']} steps" if current.get("steps") else ""
        data = current.get("data")
        hashes = (
            ", ".join(f"{part} {str(value)[:12]}" for part, value in data.items())
            if isinstance(data, Mapping)
            else ""
        )
        opening = "Trained" if level == 0 else "which was trained"
        yield (
            f"{opening} by task {current.get('task', 'unknown')}{loss}{steps} on data {hashes or 'unknown'}, "
            f"base {name or 'unknown'}"
            + (
                f", starting from {start.get('path', 'another adapter')}"
                if isinstance(start, Mapping)
                else ""
            )
            + "."
        )
        current = start.get("lineage") if isinstance(start, Mapping) else None


def hash_files(adapter: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that an adapter is read from.

    Args:
        adapter: Its directory, or its file.
    """
    if adapter.is_file():
        return {adapter.name: _hash(adapter)}
    # Its story, proof, card and tokenizer may change without another adapter.
    files = [
        file
        for pattern in ("*.safetensors", "adapter_config.json", "*.bin")
        for file in sorted(adapter.rglob(pattern))
        if file.name != START
    ]
    return {str(file.relative_to(adapter)): _hash(file) for file in files}


def _digest(adapter: Path) -> str:
    tensors = {name: value for name, value in hash_files(adapter).items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
