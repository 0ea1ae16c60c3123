"""Rows as labeled examples: a text or a pair of texts with a label, several labels or a number; or words with tags.

{"text": …, "label": …}                      {"text": …, "text_pair": …, "label": …}
{"text": …, "label": ["a", "b"]}             {"text": …, "label": 2.6}
{"tokens": ["He", "left"], "tags": ["B-PER", "O"]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moslora.data.columns import Unread, unread_keys
from moslora.data.faults import Faults, kind_of, listed, quoted
from moslora.data.files import Records
from moslora.errors import DataError
from moslora.wording import nearest

__all__ = ["PROBLEMS", "Labeled", "Problem", "read_labeled", "recognize"]

Problem = Literal["single-label", "multi-label", "regression", "tokens"]
PROBLEMS: tuple[Problem, ...] = ("single-label", "multi-label", "regression", "tokens")
# Columns that are read, by what they are called here.
OF_SEQUENCES, OF_WORDS = ("text", "text_pair", "label"), ("tokens", "tags")


@dataclass(frozen=True)
class Labeled:
    """One labeled example.

    Attributes:
        place: Where it stands in its file.
        label: As the row has it: a text or whole number; several of them; a number; or one of them for each word.
        text, text_pair: What is classified; no second text where there is none.
        words: The words that are tagged, instead of a text.
        extra: The other columns, untouched.
    """

    place: str
    label: Any
    text: str = ""
    text_pair: str | None = None
    words: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    messages = None

    @property
    def prompt(self) -> str:
        """What is classified, for people to read."""
        if self.words is not None:
            return " ".join(self.words)
        return self.text if self.text_pair is None else f"{self.text}\n⸻\n{self.text_pair}"

    @property
    def identity(self) -> str:
        """What makes two examples the same but for their labels."""
        return json.dumps(self.words if self.words is not None else [self.text, self.text_pair])


class _FieldError(ValueError):
    """A fault in one row, without its place, which the caller knows."""


def recognize(records: Records, columns: Mapping[str, str]) -> Problem:
    """Tell from the rows which problem they are of.

    Args:
        records: At least one row.
        columns: The file's columns by ours, where they have other names.

    Returns:
        By the columns, and by the kind of the labels.
    """
    if all(_column(name, columns) in records.rows[0] for name in OF_WORDS):
        return "tokens"
    labels = [row.get(_column("label", columns)) for row in records.rows]
    if any(isinstance(label, list) for label in labels):
        return "multi-label"
    return "regression" if any(isinstance(label, float) for label in labels) else "single-label"


def read_labeled(
    records: Records, problem: Problem, columns: Mapping[str, str], hidden: bool = False
) -> list[Labeled]:
    """Interpret rows.

    Args:
        records: Rows, as ``read_records`` gives them.
        problem: What the labels are.
        columns: The file's columns by ours, where they have other names.
        hidden: Whether -1 stands for a label that the file does not tell, as in GLUE's test sets.

    Returns:
        One example per row, in order.

    Raises:
        DataError: If a row does not fit, naming place and field, or has keys that nobody reads.
    """
    ours = OF_WORDS if problem == "tokens" else OF_SEQUENCES
    _check_columns(records, ours, columns)
    names = {name: _column(name, columns) for name in ours}
    faults, unread = Faults(records.source), Unread()
    examples: list[Labeled] = []
    first: tuple[str, str] | None = None  # the kind of the first label, and where it is
    for place, row in zip(records.places, records.rows, strict=True):
        try:
            label = _label(row, names, problem, hidden)
            kind = _kind(label, problem)
            if kind and first is None:
                first = kind, place
            if kind and first is not None and kind != first[0]:
                raise _FieldError(
                    f"field {names['tags' if problem == 'tokens' else 'label']!r} is {kind}, and at {first[1]} it is "
                    f"{first[0]}; write all labels alike"
                )
            extra = {key: value for key, value in row.items() if key not in names.values()}
            if problem == "tokens":
                examples.append(Labeled(place, label, words=_words(row, names, label), extra=extra))
            else:
                pair = row.get(names["text_pair"])
                second = None if pair is None else _text(row, names["text_pair"])
                examples.append(Labeled(place, label, _text(row, names["text"]), second, extra=extra))
        except _FieldError as problem_found:
            faults.add(place, str(problem_found))
        else:
            unread.add(place, unread_keys(row, names.values()))
    if problem != "tokens":
        _check_pairs(examples, names["text_pair"], faults)
    advice = f"Correct or remove these rows (read as task.problem={problem}); none was skipped."
    if unread:
        advice = f"{advice if faults.count else 'Rename or remove these fields.'} {unread.advice()}"
    for fault in unread.faults():
        faults.add("", fault)
    faults.raise_if_any(advice)
    return examples


def _column(name: str, columns: Mapping[str, str]) -> str:
    return columns.get(name, name)


def _check_columns(records: Records, ours: Sequence[str], columns: Mapping[str, str]) -> None:
    """Refuse names of columns that no row has, and rows whose columns are others altogether."""
    present = {str(key) for row in records.rows for key in row}
    for name, own in columns.items():
        if name in ours and own not in present:
            near = nearest(own, sorted(present))
            hint = f" Did you mean {near!r}?" if near else ""
            raise DataError(
                records.source,
                [f"no row has a column {own!r}, which stands for {name!r}"],
                f"{hint.strip()}".strip() or f"The columns are {listed(sorted(present))}.",
            )
    required = [name for name in ours if name != "text_pair"]
    missing = [_column(name, columns) for name in required if _column(name, columns) not in present]
    if missing:
        needed = " + ".join(_column(name, columns) for name in required)
        raise DataError(
            records.source,
            [f"there is no column {missing[0]!r}; found {listed(sorted(present))}"],
            f"Rows need {needed}. Say which columns stand for them, as data.columns={{{required[0]}: "
            f"{sorted(present)[0]}}}.",
        )


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise _FieldError(f"field {column!r} is missing; found {listed(row)}")
    if not isinstance(value, str):
        raise _FieldError(f"field {column!r} is {kind_of(value)}; expected text")
    if not value.strip():
        raise _FieldError(f"field {column!r} is empty; expected text")
    return value


def _words(row: Mapping[str, Any], names: Mapping[str, str], tags: Sequence[Any]) -> tuple[str, ...]:
    column = names["tokens"]
    words = row.get(column)
    if not isinstance(words, list):
        raise _FieldError(f"field {column!r} is {kind_of(words)}; expected a list of words")
    if not words:
        raise _FieldError(f"field {column!r} is an empty list; expected words")
    for index, word in enumerate(words):
        if not isinstance(word, str) or not word.strip():
            found = kind_of(word) if not isinstance(word, str) else "empty"
            raise _FieldError(f"field {f'{column}[{index}]'!r} is {found}; expected a word")
    if len(words) != len(tags):
        raise _FieldError(
            f"field {names['tags']!r} has {len(tags)} tags and field {column!r} {len(words)} words; expected one for "
            "each"
        )
    return tuple(words)


def _label(row: Mapping[str, Any], names: Mapping[str, str], problem: Problem, hidden: bool) -> Any:
    column = names["tags" if problem == "tokens" else "label"]
    value = row.get(column)
    if value is None:
        what = "missing" if column not in row else "null"
        raise _FieldError(f"field {column!r} is {what}; expected {EXPECTED[problem]}")
    if hidden and value == -1:
        raise _FieldError(
            f"field {column!r} is -1: GLUE keeps this label secret. Use a split whose labels are public, as "
            "data.heldout_split=validation"
        )
    if problem == "regression":
        return _number(value, column)
    if problem == "single-label":
        return _class(value, column)
    if not isinstance(value, list):
        raise _FieldError(f"field {column!r} is {kind_of(value)}; expected {EXPECTED[problem]}")
    labels = tuple(_class(one, f"{column}[{index}]") for index, one in enumerate(value))
    if problem == "multi-label" and len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise _FieldError(f"field {column!r} has {quoted(str(twice))} twice")
    return labels


EXPECTED = {
    "single-label": "a label, text or a whole number",
    "multi-label": "a list of labels",
    "regression": "a number",
    "tokens": "a list of tags, one for each word",
}


def _class(value: Any, column: str) -> str | int:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if not value.strip():
            raise _FieldError(f"field {column!r} is empty; expected a label")
        return value
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)  # tables with gaps have no whole numbers
    raise _FieldError(f"field {column!r} is {_found(value)}; expected a label, text or a whole number")


def _number(value: Any, column: str) -> float:
    if isinstance(value, str):  # tables of text, as CSV
        try:
            value = float(value)
        except ValueError:
            raise _FieldError(f"field {column!r} is {quoted(value)}; expected a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _FieldError(f"field {column!r} is {kind_of(value)}; expected a number")
    if not math.isfinite(value):
        raise _FieldError(f"field {column!r} is {value}; expected a finite number")
    return float(value)


def _found(value: Any) -> str:
    return repr(value) if isinstance(value, float) else kind_of(value)


def _kind(label: Any, problem: Problem) -> str:
    """Return of which kind a label's classes are, in words; empty where there is none."""
    if problem == "regression":
        return ""
    labels: Iterable[Any] = label if isinstance(label, tuple) else (label,)
    kinds = sorted({"text" if isinstance(one, str) else "a whole number" for one in labels})
    return " and ".join(kinds)


def _check_pairs(examples: Sequence[Labeled], column: str, faults: Faults) -> None:
    """Note rows without a second text in a file whose other rows have one."""
    alone = [example for example in examples if example.text_pair is None]
    if alone and len(alone) < len(examples):
        few = alone if len(alone) * 2 <= len(examples) else [e for e in examples if e.text_pair is not None]
        for example in few:
            is_alone = example.text_pair is None
            faults.add(
                example.place,
                f"field {column!r} is {'missing' if is_alone else 'given'}, and most other rows have "
                f"{'one' if is_alone else 'none'}",
            )
