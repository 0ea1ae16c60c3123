"""Values as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any


class NotFiniteError(ValueError):
    """A NaN or an infinity where JSON wants a number."""


def json_value(value: Any, key: str) -> Any:
    """Return ``value`` as JSON has it; ``key`` is its dotted path, for errors."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotFiniteError(f"{key} is {value}, which JSON cannot hold; leave it out or write None.")
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{key} has the key {name!r}; keys of JSON are strings.")
        return {name: json_value(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of numpy and torch
        return json_value(value.item(), key)
    raise TypeError(f"{key} is a {type(value).__name__}, which has no form in JSON; convert it first.")


def merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``old`` updated with ``new``, mapping by mapping."""
    result = dict(old)
    for key, value in new.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result
