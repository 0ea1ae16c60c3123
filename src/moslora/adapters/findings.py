"""What ``moslora doctor`` finds: one thing looked at, and the diagnosis of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["LEVELS", "Diagnosis", "Finding", "some", "to_json"]

LEVELS = ("ok", "note", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: One of ``LEVELS``; only ``"error"`` makes the adapter unusable as asked.
        check: What was looked at, in a word.
        what: What was found.
        fix: What to do about it; empty where there is nothing to do.
    """

    level: str
    check: str
    what: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found.

    Attributes:
        adapter: Where it is.
        format: A key of ``formats.FORMATS``; None if it cannot be told.
        base: The base it was held against; None if none.
        engines: Where it will run.
        findings: In the order of the checks.
    """

    adapter: str
    format: str | None
    base: str | None
    engines: tuple[str, ...]
    findings: tuple[Finding, ...]

    def count(self, level: str) -> int:
        """Count the findings of a level.

        Args:
            level: One of ``LEVELS``.
        """
        return sum(finding.level == level for finding in self.findings)

    @property
    def is_usable(self) -> bool:
        """Whether there is no error."""
        return self.count("error") == 0

    @property
    def verdict(self) -> str:
        """A sentence to act on."""
        errors, warnings = self.count("error"), self.count("warning")
        where = f" for {', '.join(self.engines)}" if self.engines else ""
        if errors:
            return f"Not usable{where} as it is: {errors} fault{'s' * (errors > 1)}."
        if warnings:
            return f"Usable{where}, with {warnings} thing{'s' * (warnings > 1)} to know first."
        return f"Sound{where}: nothing wrong was found."


def some(names: Sequence[str]) -> str:
    """Return the first three of many names, for a sentence."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return a diagnosis for programs.

    Args:
        diagnosis: What was found.

    Returns:
        A JSON object: its attributes, ``usable`` and ``verdict``.
    """
    from dataclasses import asdict

    return {**asdict(diagnosis), "usable": diagnosis.is_usable, "verdict": diagnosis.verdict}
