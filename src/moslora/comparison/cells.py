"""The cells of a comparison: which there are, how one is trained and measured, and how its result is kept.

A cell is one training: a method, a learning rate, a seed. The base is loaded once; a cell puts its adapter in, trains
with the task's own trainer, is measured, and takes the adapter out again, after which the base's weights must have the
same bits. Several cells may train at once over the one base (``together.py``); each gives what it gives alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moslora.comparison.bench import Bench
from moslora.comparison.cell_files import begin, forget, keep
from moslora.comparison.lanes import CannotShare
from moslora.comparison.methods import Method
from moslora.comparison.plan import Comparison, Planned
from moslora.comparison.verdict import Cell
from moslora.display import Display
from moslora.errors import UsageError
from moslora.tasks import find_task

if TYPE_CHECKING:
    from moslora.tasks.language import LanguageTask

__all__ = [
    "in_groups",
    "prepare_task",
    "run_cells",
    "run_unkept",
]


def prepare_task(plan: Comparison, display: Display, check: Callable[[], None]) -> LanguageTask:
    """Read and encode the data; refuse what cannot be compared.

    Args:
        plan: What is compared.
        display: Where to tell of progress.
        check: Called between pieces of work; raises where it was asked to stop.

    Returns:
        The task, ready to load its base.

    Raises:
        ValueError: If data or model cannot be used.
    """
    task: Any = find_task(plan.recipe.task.kind)(plan.recipe, display, check)
    if not hasattr(task, "set_aside"):
        raise UsageError(f"task.kind={plan.recipe.task.kind} cannot be compared: it sets no examples aside.")
    if plan.recipe.start_from is not None:
        raise UsageError(
            "adapter.start_from cannot be compared: methods differ in the structure that an adapter has, and each "
            "would "
            "need a start of its own. Leave it out."
        )
    for method in plan.methods:
        task.check_method(method.name, method.configure(plan.recipe.adapter))
    task.check_adapter()
    task.read()
    task.set_aside(plan.validation, plan.examples)
    task.prepare()
    return task  # type: ignore[no-any-return]


# --- What is kept of them -----------------------------------------------------------------------------------


def in_groups(plan: Comparison, left: Sequence[Planned], together: int) -> list[list[Planned]]:
    """Group cells that are to be trained at once over one base.

    Cells of one method go together, so that a method's time and memory remain its own; groups of a method are as alike
    in size as can be, so that methods remain comparable. Methods that change the base run alone, and so do cells in
    which a process died, so that what one of them did is not blamed on the others.

    Args:
        plan: What is compared.
        left: The cells, in the order of running.
        together: How many at once, at most.

    Returns:
        The groups, in the order of their first cells.
    """
    groups: list[list[Planned]] = []
    for method in dict.fromkeys(method.name for method, _, _ in left):
        own = [cell for cell in left if cell[0].name == method]
        shy = [cell for cell in own if not _can_share(cell[0]) or plan.mark(cell).exists()]
        bold = [cell for cell in own if cell not in shy]
        many = -(-len(bold) // together)
        sizes = [len(bold) // many + (index < len(bold) % many) for index in range(many)]
        for size in sizes:
            groups.append(bold[:size])
            bold = bold[size:]
        groups += [[cell] for cell in shy]
    return groups


def _can_share(method: Method) -> bool:
    return method.library != "none" and not method.changes_base


def run_cells(bench: Bench, cells: Sequence[Planned]) -> list[Cell]:
    """Run cells and keep their results, with a mark beside each for as long as it runs.

    Args:
        bench: Where.
        cells: Which; several are trained at once if they can be, and one after the other if not.

    Returns:
        The cells, written.
    """
    plan = bench.plan
    for cell in cells:
        begin(plan, cell)
    try:
        found = run_unkept(bench, cells, lambda cell: keep(plan, cell))
    except BaseException:
        for cell in cells:
            forget(plan, cell)  # this process lives, so it was no death
        raise
    return found


def run_unkept(
    bench: Bench, cells: Sequence[Planned], done: Callable[[Cell], None] = lambda _: None
) -> list[Cell]:
    """Run cells, at once if they can be.

    Args:
        bench: Where.
        cells: Which.
        done: Told of each that is finished.

    Returns:
        Their results.
    """
    found: list[Cell] = []
    name = cells[0][0].name
    if len(cells) > 1 and name not in bench.alone:
        try:
            found = bench.run_together(cells)
        except CannotShare as reason:
            bench.alone.add(name)
            bench.display.say(f"Cells of {name} are trained one after the other: {reason}.")
    if found:
        for cell in found:
            done(cell)
        return found
    for planned in cells:
        bench.stop.check()
        found.append(bench.run(*planned))
        done(found[-1])
    return found
