r"""Columns under names of one's own: ``data.columns`` gives each column of a shape a column of the file, or a template.

    columns: {prompt: "{question}\n\n{context}", completion: answers.text.0, system: role}

A value without braces is a column, or a path into one with dots; one with braces is text in which ``{name}`` stands for
what the row has there. ``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from moslora.data.columns import says_nothing
from moslora.data.faults import Faults, kind_of, listed
from moslora.data.files import Records
from moslora.wording import nearest

__all__ = ["TARGETS", "parse_template", "rename_columns"]

# Columns that the shapes read.
TARGETS = (
    *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text"),
    *("system", "tools", "chat_template_kwargs", "images", "image", "kind"),
    *("chosen", "rejected", "label", "labels"),  # of preferences and classes
)
PIECES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


@lru_cache(maxsize=64)
def parse_template(template: str) -> tuple[tuple[str, bool], ...] | None:
    """Split a template into its parts.

    Args:
        template: A value of ``data.columns``.

    Returns:
        Each part, and whether it is the name of a column; None if there are no braces, so that the whole is a name.

    Raises:
        ValueError: If a brace stands alone, or no name is between two.
    """
    if "{" not in template and "}" not in template:
        return None
    parts: list[tuple[str, bool]] = []
    at = 0
    for found in PIECES.finditer(template):
        parts.append((template[at : found.start()], False))
        at = found.end()
        if found[0] in ("{{", "}}"):
            parts.append((found[0][0], False))
        elif found[1] is None:
            raise ValueError(
                f"a template whose braces come in pairs; write {found[0] * 2} for a brace itself"
            )
        elif not found[1].strip():
            raise ValueError(
                "a template with a column's name between its braces; write {{}} for braces themselves"
            )
        else:
            parts.append((found[1].strip(), True))
    parts.append((template[at:], False))
    return tuple(part for part in parts if part[0])


def rename_columns(records: Records, columns: Mapping[str, str] | None) -> Records:
    """Give columns the names that the shapes read.

    Args:
        records: Rows, as ``read_records`` gives them.
        columns: ``data.columns``; None or empty changes nothing.

    Returns:
        The rows with the columns named; those that they were made from are gone, all others stay.

    Raises:
        DataError: If rows lack a column that is named, with the nearest that they have, or a template's column is not
            text or a number; or if a column would be replaced that nothing reads.
    """
    if not columns:
        return records
    sources = {target: parse_template(source) or ((source, True),) for target, source in columns.items()}
    plain = {target: parse_template(source) is None for target, source in columns.items()}
    used = {name for parts in sources.values() for name, is_column in parts if is_column}
    # A path uses up the column that it begins in.
    faults, rows = Faults(records.source), []
    for place, row in zip(records.places, records.rows, strict=True):
        heads = {name if name in row else name.partition(".")[0] for name in used}
        named: dict[str, Any] = {}
        for target, parts in sources.items():
            if target in row and target not in heads:
                faults.add(
                    place,
                    f"data.columns makes {target!r}, and the row has such a column, which would be ignored; drop that: "
                    f"data.ignore=[{target}]",
                )
                break
            try:
                found = [_value(row, text) if is_column else text for text, is_column in parts]
                named[target] = (
                    found[0] if plain[target] else "".join(map(_as_text, found, [p[0] for p in parts]))
                )
            except ValueError as problem:
                faults.add(place, f"{problem} (data.columns.{target})")
                break
        else:
            rows.append({**{key: value for key, value in row.items() if key not in heads}, **named})
    faults.raise_if_any("Correct data.columns or these rows; none was skipped.")
    return replace(records, rows=rows)


def _value(row: Mapping[str, Any], path: str) -> Any:
    """Return what a row has under a column's name, or under a path into it."""
    if path in row:  # a column's own name may have dots
        return row[path]
    value: Any = row
    for depth, key in enumerate(path.split(".")):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise ValueError(_missing(path, key, value, depth))
    return value


def _missing(path: str, key: str, value: Any, depth: int) -> str:
    what = f"field {path!r} is missing"
    if isinstance(value, Mapping):
        near = nearest(key, [str(name) for name in value])
        way = f"did you mean {near!r}?" if near else f"found {listed(value)}"
        return f"{what}; {way}" if depth == 0 else f"{what}: {key!r}; {way}"
    if isinstance(value, list):
        return f"{what}: the list has {len(value)} items, and no {key!r}"
    return f"{what}: {kind_of(value)} has no {key!r}"


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if says_nothing(value):
        raise ValueError(
            f"field {name!r} is {'null' if value is None else 'empty'}, and a template needs a text"
        )
    raise ValueError(f"field {name!r} is {kind_of(value)}; a template needs a text or a number")
