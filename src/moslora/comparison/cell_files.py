"""Cells on disk: results, marks of cells that run, and cells in which the process died."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

from moslora.comparison.plan import Comparison, Planned
from moslora.comparison.verdict import Cell
from moslora.display import Display
from moslora.errors import UsageError
from moslora.files import write_text

__all__ = ["begin", "forget", "keep", "mark_crashed_cells", "read_cells"]


# A process that died this often in one cell is not sent in again.
DEATHS = 2


def begin(plan: Comparison, cell: Planned) -> None:
    """Note that a cell is begun, one time more than before.

    Args:
        plan: What is compared.
        cell: Which.
    """
    write_text(plan.mark(cell), str(_begun(plan, cell) + 1))


def _begun(plan: Comparison, cell: Planned) -> int:
    mark = plan.mark(cell)
    return int(mark.read_text(encoding="ascii")) if mark.exists() else 0


def keep(plan: Comparison, cell: Cell) -> None:
    """Write a cell's result, and take its mark away.

    Args:
        plan: What is compared.
        cell: Finished.
    """
    file = plan.file_of(cell.method, cell.learning_rate, cell.seed)
    write_text(file, json.dumps(dataclasses.asdict(cell), allow_nan=False))
    file.with_suffix(".started").unlink(missing_ok=True)


def forget(plan: Comparison, cell: Planned) -> None:
    """Take a cell's mark away: it is not finished, and nothing died in it.

    Args:
        plan: What is compared.
        cell: Which.
    """
    plan.mark(cell).unlink(missing_ok=True)


def mark_crashed_cells(plan: Comparison, display: Display, cells: Sequence[Planned] | None = None) -> None:
    """Count a cell as crashed in which the process died again and again, for example out of memory.

    Args:
        plan: What is compared.
        display: Where to tell of it.
        cells: Which to look at, none of them under way; all of the plan if None.
    """
    for cell in plan.cells if cells is None else cells:
        method, rate, seed = cell
        if plan.cell_file(*cell).exists():
            forget(plan, cell)  # killed between the result and this
            continue
        if _begun(plan, cell) < DEATHS:
            continue
        reason = f"the process died {DEATHS} times in this cell, perhaps out of memory"
        keep(plan, Cell(method.name, rate, seed, "crashed", reason))
        display.warn(f"{method.name}, {rate:g}, seed {seed}: {reason}.")


def read_cells(plan: Comparison) -> list[Cell]:
    """Read the results that are there.

    Args:
        plan: What is compared.

    Raises:
        ValueError: If one is damaged; names it.
    """
    cells = []
    for cell in plan.cells:
        file = plan.cell_file(*cell)
        if file.exists():
            state = file.stat()
            cells.append(_read(file, state.st_mtime_ns, state.st_size, state.st_ino))
    return cells


@functools.lru_cache(maxsize=100_000)
def _read(file: Path, *_: int) -> Cell:
    """Read a result; after each cell all are asked for again, so each is read once for as long as its file stays."""
    try:
        return Cell(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file} is damaged; remove it to have its cell run again.") from error
