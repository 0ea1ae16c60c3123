"""Numbers, sizes and durations as a page shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

UNIT = "held-out examples"
CLIP = 1500  # characters of one prompt or answer


def flattened(section: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values as text."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield from flattened(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(section, list):
        yield prefix, ", ".join(map(str, section)) or "none"
    else:
        yield prefix, "—" if section is None else str(section)


def is_number(value: Any) -> bool:
    """Return whether a value is a number, which True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    return float(value) if is_number(value) and math.isfinite(value) else None


def percent(share: float) -> str:
    """Write a share in percent, without the sign."""
    return f"{100 * share:.1f}".removesuffix(".0")


def clipped(value: Any) -> str:
    """Write a value as text, cut to ``CLIP`` characters."""
    if value is None:
        return "—"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= CLIP else f"{text[:CLIP]} … ({len(text) - CLIP} more characters)"


def section_of(record: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a mapping inside a record; an empty one if it is missing."""
    section = record.get(key)
    return section if isinstance(section, Mapping) else {}
