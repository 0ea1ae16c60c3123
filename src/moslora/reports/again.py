"""A report made again from what a run or a comparison recorded, as where it was killed before it had one."""

from __future__ import annotations

import json
from pathlib import Path

from moslora.comparison.methods import METHODS
from moslora.errors import NotFoundError, UsageError
from moslora.reports.comparison import write_comparison_report
from moslora.reports.run import write_report
from moslora.training.measuring import restore_measurements
from moslora.training.run_directory import RunDirectory, is_alive

__all__ = ["remake_report"]


def remake_report(path: Path) -> Path:
    """Make ``report.html`` again, drawings included; nothing is trained or measured.

    Args:
        path: A run directory, in whatever state, or a comparison's folder with its results.

    Returns:
        Path of the report, which replaces an older one.

    Raises:
        NotFoundError: If neither a run nor a comparison is there.
        UsageError: If one of its files is damaged, or the comparison has no results yet.
    """
    path = Path(path)
    if (path / "compare.json").is_file():
        return _of_comparison(path)
    if path.is_file():
        raise NotFoundError(f"{path} is a file; name the directory of a run or of a comparison.")
    run = RunDirectory.open(path)  # says what is there instead, with the nearest run
    if not is_alive(run):
        restore_measurements(run)
    return write_report(path)


def _of_comparison(folder: Path) -> Path:
    if not (folder / "results.json").is_file():
        raise UsageError(
            f"{folder} has no results yet: not all of its cells are finished. The command that began it continues "
            "with it, and makes the report; compare.json has it under command."
        )
    try:
        record = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        names = list(record["identity"]["methods"])
        about = record.get("about", {})  # which version 0.1 did not write
        return write_comparison_report(folder, {name: about.get(name, _about(name)) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"A record in {folder} is damaged ({type(error).__name__}: {error}). Restore compare.json and results.json "
            "from a copy; without results.json the command that began the comparison writes it again."
        ) from error


def _about(name: str) -> str:
    return METHODS[name].about if name in METHODS else "a configuration of your own"
