"""Faults in data files: collected, so that one error names several, and put into words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from moslora.errors import DataError

__all__ = ["SHOWN", "Faults", "kind_of", "listed", "quoted"]

SHOWN = 5  # faults that one error spells out; the rest are counted


@dataclass
class Faults:
    """Collects faults while reading continues, so that one error names several.

    Attributes:
        source: The file or hub id, as the user wrote it.
        first: The first faults, in words.
        count: How many there are.
    """

    source: str
    first: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, what: str) -> None:
        """Note a fault.

        Args:
            place: Where it is, such as ``"line 17"``; empty for the whole file.
            what: What is wrong.
        """
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{place}: {what}" if place else what)

    def merge(self, first: Iterable[str], count: int) -> None:
        """Note faults that others have found later in the same source.

        Args:
            first: The first of them, in words.
            count: How many there are.
        """
        self.first += list(first)[: SHOWN - len(self.first)]
        self.count += count

    def raise_if_any(self, advice: str) -> None:
        """Raise one error for all faults.

        Args:
            advice: What to do about them, one sentence.

        Raises:
            DataError: If there are any.
        """
        if self.count:
            raise DataError(self.source, self.first, advice, self.count - len(self.first))


def kind_of(value: Any) -> str:
    """Return what kind of JSON value it is, in words."""
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text",
             list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def quoted(text: str, width: int = 60) -> str:
    """Return a text in quotes, cut to ``width`` characters."""
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def listed(names: Iterable[object]) -> str:
    """Return names separated by commas; of many, the first twelve and how many more there are."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:12]) + (f" and {len(texts) - 12} more" if len(texts) > 12 else "")
