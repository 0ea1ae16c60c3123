"""What ``moslora doctor`` finds: one thing looked at, and the diagnosis of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moslora.display import Display, Printable

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["LEVELS", "NOT_HELD", "Diagnosis", "Finding", "some"]

LEVELS = ("ok", "note", "warning", "error")
NOT_HELD = "not held against a base"


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


@dataclass(frozen=True, repr=False)
class Diagnosis(Printable):
    """All that was found.

    Attributes:
        adapter: Where it is.
        format: A key of ``formats.FORMATS``; None if it cannot be told.
        base: The base it was held against; None if none.
        engines: Where it will run.
        findings: In the order of the checks.
        held: Whether its names and shapes were held against a base.
        applied: By engine, the modules that its rules say it applies.
        not_applied: By engine, the others, and what becomes of each: ``refused``, ``left out`` or ``wrong``.
        commands: By engine, the command that serves the adapter; none where it is not applied whole.
    """

    adapter: str
    format: str | None
    base: str | None
    engines: tuple[str, ...]
    findings: tuple[Finding, ...]
    held: bool = True
    applied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    not_applied: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)

    def show(self, display: Display) -> None:
        """Write the findings, each with its fix, and the verdict."""
        display.show(_findings_table(self.findings))
        display.say(self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """Return its attributes, ``usable`` and ``verdict``."""
        return {**super().to_dict(), "usable": self.is_usable, "verdict": self.verdict}

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
        unheld = "" if self.held else f" ({NOT_HELD})"
        if warnings:
            return f"Usable{where}, with {warnings} thing{'s' * (warnings > 1)} to know first{unheld}."
        return f"Sound{where}: nothing wrong was found{unheld}."


def some(names: Sequence[str]) -> str:
    """Return the first three of many names, for a sentence."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _findings_table(findings: Sequence[Finding]) -> Table:
    """Lay out findings, each with its fix below it."""
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "note": "cyan", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    for column in ("level", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("what", overflow="fold")
    for finding in findings:
        what = Text(finding.what)
        if finding.fix:
            what.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.level, style=colors[finding.level]), Text(finding.check), what)
    return table
