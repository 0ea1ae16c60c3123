"""The report of a run or of a comparison, made again in one call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.display import Display, Printable
from moslora.failures import verb
from moslora.reports.again import remake_report

__all__ = ["WrittenReport", "report"]


@dataclass(frozen=True, repr=False)
class WrittenReport(Printable):
    """A page that opens offline.

    Attributes:
        source: The directory of the run or the comparison.
        path: The page.
    """

    source: Path
    path: Path

    def show(self, display: Display) -> None:
        """Write where the page is."""
        display.say(f"Report, opens in a browser:   {self.path}")

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {"source": str(self.source), "report": str(self.path)}


@verb("report")
def report(path: str | os.PathLike[str]) -> WrittenReport:
    """Make the report of a run or of a comparison again, from what it recorded; nothing is trained or measured.

    Args:
        path: A run directory in whatever state, or a comparison's folder that has results.

    Returns:
        Where the page is; it replaces an older one.

    Raises:
        NotFoundError: If neither a run nor a comparison is at ``path``.
        UsageError: If one of its files is damaged, or the comparison has no results yet.

    Example:
        >>> run = moslora.train(
        ...     model="base-model", data="data.jsonl", trainer={"max_steps": 2}, output="runs/again"
        ... )
        >>> run.report.unlink()
        >>> moslora.report("runs/again").path.is_file()
        True
    """
    source = Path(path)
    return WrittenReport(source, remake_report(source))
