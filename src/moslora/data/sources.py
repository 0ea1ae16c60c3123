"""Several files as one set of examples, each with settings and a weight of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.data.columns import without_keys
from moslora.data.files import Records, read_records
from moslora.data.naming import rename_columns
from moslora.data.shapes import Example, to_examples
from moslora.errors import DataError, UsageError

if TYPE_CHECKING:
    from moslora.recipe.data_section import DataSection, SourceSection

__all__ = ["Part", "read_sources", "weighted"]


@dataclass(frozen=True)
class Part:
    """What one file gives.

    Attributes:
        records: Its rows, without what is ignored.
        present: Which entries of ``ignore`` some row has.
        examples: The rows, interpreted.
        weight: How often each example is in an epoch.
        name: What it is called beside the others.
    """

    records: Records
    present: set[str]
    examples: Sequence[Example]
    weight: float
    name: str


def read_sources(
    sources: str | Sequence[str | SourceSection], data: DataSection, split: str, limit: int | None
) -> list[Part]:
    """Read one file, or several.

    Args:
        sources: ``data.train`` or ``data.heldout``.
        data: The section, whose settings hold where a file has none of its own.
        split: Which split of folders and hub data sets.
        limit: Rows of each file, at most; None for all.

    Returns:
        One part per file. The places of several have their file's name before the line.

    Raises:
        DataError: If one cannot be used.
        UsageError: If several cannot; all are told.
    """
    if isinstance(sources, str):
        return [_read(sources, None, data, split, limit, sources)]
    paths = [source if isinstance(source, str) else source.path for source in sources]
    stems = [Path(path).name for path in paths]
    parts, problems = [], []
    for source, path, stem in zip(sources, paths, stems, strict=True):
        own = None if isinstance(source, str) else source
        name = stem if stems.count(stem) == 1 else path
        try:
            part = _read(path, own, data, split, limit, name)
        except DataError as problem:
            problems.append(problem)
            continue
        examples = [replace(example, place=f"{name}, {example.place}") for example in part.examples]
        parts.append(replace(part, examples=examples))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise UsageError("\n".join(map(str, problems)))
    return parts


def _read(
    path: str, own: SourceSection | None, data: DataSection, split: str, limit: int | None, name: str
) -> Part:
    def setting(key: str, default: Any) -> Any:
        value = getattr(own, key, None)
        return default if value is None else value

    records, present = without_keys(
        read_records(path, setting("split", split), setting("limit", limit)),
        setting("ignore", data.ignore) or (),
    )
    renamed = rename_columns(records, setting("columns", data.columns))
    examples = to_examples(renamed, setting("format", data.format), data.reasoning, data.system_turn)
    return Part(records, present, examples, 1.0 if own is None else own.weight, name)


def weighted(examples: Sequence[Example], weight: float, seed: int) -> list[Example]:
    """Repeat examples, or take a share of them.

    Args:
        examples: Of one file.
        weight: How often each is there: 2 twice, 0.25 a quarter of them, 1.5 all and half of them again.
        seed: Another seed takes another share.

    Returns:
        The examples, in their order. Which are in a share depends on content and seed alone.
    """
    whole, rest = int(weight), weight - int(weight)
    count = round(rest * len(examples))
    draws = sorted(range(len(examples)), key=lambda number: (_draw(examples[number], seed), number))
    share = set(draws[:count])
    return [*list(examples) * whole, *(e for number, e in enumerate(examples) if number in share)]


def _draw(example: Example, seed: int) -> str:
    turns = [message.says() for message in example.messages or ()]
    content = [seed, "weight", turns, example.prompt, example.completion, example.text]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
