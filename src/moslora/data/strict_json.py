"""Strict JSON: what ``json.loads`` accepts beyond the standard is refused. For data files and for answers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

__all__ = ["parse_json"]


def parse_json(text: str) -> Any:
    """Parse JSON strictly: no NaN, no infinite number, no key twice, no lone surrogate.

    Args:
        text: One JSON document, white space around it allowed.

    Returns:
        The value, as ``json.loads`` gives it.

    Raises:
        ValueError: With the fault and, for bad syntax, line and column.
    """
    try:
        value = _STRICT.decode(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a lone surrogate fails much later, in a tokenizer
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno}, " if problem.lineno > 1 else ""
        raise ValueError(f"{problem.msg} ({line}column {problem.colno})") from None
    except UnicodeEncodeError:
        raise ValueError("a \\ud… escape without its other half is not a character") from None
    except RecursionError:
        raise ValueError("too many nested levels") from None
    except ValueError as problem:
        if "int_max_str_digits" in str(problem):  # Python's own limit, 4300
            raise ValueError("a number has thousands of digits; write it as text") from None
        raise
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} appears twice in one object")
    return keys


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"number {digits} is too large")
    return value


_STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
