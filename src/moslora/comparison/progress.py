"""What is told of finished cells, and whether training the whole model fits in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moslora.comparison.bench import Bench
from moslora.comparison.cell_files import read_cells
from moslora.comparison.plan import Comparison
from moslora.comparison.verdict import Cell, foresee
from moslora.errors import UsageError
from moslora.wording import duration

if TYPE_CHECKING:
    from moslora.display import Display


def show_cell(plan: Comparison, cell: Cell, left: int, workers: int, display: Display) -> None:
    """Tell of a finished cell; after the first how long the rest takes, after the first seeds what could be seen."""
    from statistics import fmean

    what = f"{cell.method}, rate {cell.learning_rate:g}, seed {cell.seed}"
    if plan.stage == 2 and cell.status == "done":
        display.say(f"{what}: done in {cell.cell_seconds:.0f} s.")
    elif cell.validation is not None and cell.test is not None:
        display.say(
            f"{what}: validation loss {fmean(cell.validation):.4f}, held out {fmean(cell.test):.4f}; "
            f"{cell.cell_seconds:.0f} s."
        )
    else:
        display.warn(f"{what} {cell.status}: {cell.reason}.")
    done = read_cells(plan)
    if left:
        mean = fmean([c.cell_seconds for c in done if c.cell_seconds] or [0.0])
        display.say(f"  {left} cells left, about {duration(mean * left / workers)}.")
    if plan.stage == 2:
        return
    first = [c for c in done if (c.method, c.learning_rate) == (plan.baseline, plan.cells[0][1])]
    if len(first) == len(plan.seeds) and cell in first:
        size = foresee(first, len(plan.seeds), len(plan.pairs))
        if size is not None:
            display.say(
                f"By the spread of {plan.baseline}'s seeds, this comparison can show a difference in held-out loss of "
                f"about {size:.2g}, four times out of five; of less if seeds move the methods alike. For a smaller "
                "one take more seeds (--seeds) or examples (--examples)."
            )


def check_memory(plan: Comparison, bench: Bench, device: str) -> None:
    """Refuse to train the whole model where its gradients and Adam's two moments do not fit."""
    if not any(method.library == "none" for method in plan.methods):
        return
    needed = sum(p.numel() * p.element_size() for p in bench.model.parameters()) * 3
    if device.startswith("cuda"):
        import torch

        free = int(torch.cuda.mem_get_info()[0])
    else:
        import psutil

        free = int(psutil.virtual_memory().available)
    if needed > free:
        raise UsageError(
            f"Method full needs about {needed / 1e9:.1f} GB beside the base, and {free / 1e9:.1f} GB are free. Leave "
            "it out of --methods."
        )
