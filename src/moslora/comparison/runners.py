"""Where the cells of a comparison run: in this process, in several on this machine, or on a Ray cluster.

All of them leave the same: one file per cell, written whole. A cell that is finished is never run again, and one in
which a process died twice counts as crashed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moslora.comparison.bench import Bench
from moslora.comparison.cell_files import mark_crashed_cells
from moslora.comparison.cells import in_groups
from moslora.comparison.local import run_local
from moslora.comparison.plan import Comparison, Engine, Planned
from moslora.comparison.progress import check_memory
from moslora.comparison.ray_cluster import import_ray, run_on_ray
from moslora.errors import UsageError
from moslora.files import write_text
from moslora.training.stop import StopRequest

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.tasks.language import LanguageTask

__all__ = ["ENGINES", "make_engine", "run_all"]


def make_engine(name: str, workers: int | None, together: int) -> Engine:
    """Check what was asked for.

    Args:
        name: A key of ``ENGINES``.
        workers: At least 1, or None.
        together: At least 1.

    Returns:
        The engine.

    Raises:
        ValueError: If there is no such engine, it cannot be used here, or a number is below 1.
    """
    if name not in ENGINES:
        raise UsageError(f"engine={name!r} is unknown; choose one of {', '.join(ENGINES)}.")
    for what, number in (("workers", workers), ("together", together)):
        if number is not None and number < 1:
            raise UsageError(f"{what}={number} must be at least 1.")
    if name == "ray":
        import_ray()
    return Engine(name, workers, together)


def run_all(
    plan: Comparison,
    task: LanguageTask,
    display: Display,
    stop: StopRequest,
    engine: Engine,
    bench: Bench | None = None,
) -> Bench | None:
    """Run the cells that are not finished, and the base.

    Args:
        plan: What is compared.
        task: Its data, prepared.
        display: Where to tell of progress.
        stop: Asked between pieces of work.
        engine: Where and how.
        bench: That of an earlier call, whose base is used again.

    Returns:
        The bench for the next call; None where nothing was left to run and none was given.

    Raises:
        Stopped: If asked to stop.
        TrainingError: If the base cannot be brought back, or a worker cannot continue.
    """
    base = plan.base_file
    mark_crashed_cells(plan, display)
    left = [cell for cell in plan.cells if not plan.cell_file(*cell).exists()]
    if not left and base.exists():
        return bench
    stop.check()
    if bench is None:
        bench = Bench(plan, task, display, stop)
        check_memory(plan, bench, task.device)
    bench.turn_to(plan, task)
    if not base.exists():
        write_text(base, json.dumps(bench.measure_base()))
    if left:
        ENGINES[engine.name](bench, in_groups(plan, left, engine.together), engine)
    return bench


# --- On a Ray cluster ---------------------------------------------------------------------------------------


ENGINES: dict[str, Callable[[Bench, Sequence[Sequence[Planned]], Engine], None]] = {
    "local": run_local,
    "ray": run_on_ray,
}
