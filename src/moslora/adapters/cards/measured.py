"""What a run measured, in the folder of the adapter that it made: for the card, and for whoever carries it on.

``moslora_card.json`` stands beside the weights and names their hash, so that nothing is said of weights that were
saved over them since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora.adapters.formats.directory import WEIGHTS
from moslora.adapters.formats.pipeline import folders
from moslora.bounded import read_json
from moslora.files import sha256, write_text

__all__ = ["CARD_FACTS", "carried", "keep_measured", "numbers", "read_measured", "texts"]

CARD_FACTS = "moslora_card.json"


def keep_measured(folder: Path, measured: Mapping[str, Any], file: str = WEIGHTS) -> None:
    """Write what was measured beside the weights that it was measured on.

    Args:
        folder: The adapter's.
        measured: Of JSON's types.
        file: The weights; of a pipeline's folders each has its own.
    """
    if not (folder / file).is_file() and not folders(folder):
        return
    text = json.dumps({"of": _digests(folder, file), **measured}, indent=2, allow_nan=False) + "\n"
    write_text(folder / CARD_FACTS, text)


def read_measured(adapter: Path) -> dict[str, Any] | None:
    """Read what was measured on an adapter.

    Args:
        adapter: Its folder or file.

    Returns:
        What ``keep_measured`` wrote; None if there is nothing, or it is of other weights than those that are there.
    """
    folder, file = (adapter, WEIGHTS) if adapter.is_dir() else (adapter.parent, adapter.name)
    try:
        found = read_json(folder / CARD_FACTS)
        if not isinstance(found, dict) or found.pop("of", None) != _digests(folder, file):
            return None
    except (OSError, ValueError):
        return None
    return found


def carried(measured: Mapping[str, Any] | None, changes: Sequence[str]) -> dict[str, Any] | None:
    """Return what to say of an adapter that was made from a measured one.

    Args:
        measured: What was measured on the source; None if nothing is known.
        changes: In what ΔW differs from the source's, as sentences; empty where only the form changed.
    """
    if measured is None or not changes:
        return None if measured is None else dict(measured)
    return {**measured, "changes": [*texts(measured.get("changes")), *changes]}


def _digests(folder: Path, file: str) -> dict[str, str]:
    parts = {} if (folder / file).is_file() else folders(folder)
    paths = {f"{name}/{WEIGHTS}": part / WEIGHTS for name, part in parts.items()} or {file: folder / file}
    return {name: sha256(path) for name, path in sorted(paths.items())}


def numbers(value: Any) -> dict[str, float]:
    """Return the entries of a mapping that are finite numbers; empty for anything else."""
    if not isinstance(value, Mapping):
        return {}
    return {
        str(key): float(v)
        for key, v in value.items()
        if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)
    }


def texts(value: Any) -> list[str]:
    """Return the entries of a list that are texts; empty for anything else."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list | tuple) else []
