"""What is measured before the first step: the base, and an adapter that training starts from.

A whole base is measured as it was loaded. One that is split between processes can be run only once the trainer has
taken it in hand, so it is measured with its fresh adapter off, before the trainer's first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moslora.tasks.task import Evaluation, Task
from moslora.training.context import RunContext
from moslora.training.measuring import measure

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AtStart"]


class AtStart:
    """Measures what there is before the first step.

    Args:
        run: The run.
        task: Its task.
        model: The base, as it was loaded.

    Attributes:
        remembered: What the task keeps of the base, to measure by what training cost.
    """

    def __init__(self, run: RunContext, task: Task, model: nn.Module) -> None:
        self.run, self.task = run, task
        self.remembered: Any = task.remember_base(model) if run.measures(task) else None
        self._before: Evaluation | None = None

    def measure_base(self, model: nn.Module) -> None:
        """Measure the base.

        Args:
            model: The base; or the adapted model, split, whose adapter is switched off for it.
        """
        if not self.run.measures(self.task):
            return
        if not self.run.is_split:
            self._before = measure(self.run, self.task, model, "before", "base model")
            return
        from moslora.compat.peft.functions import adapters_off

        with adapters_off(model):
            self._before = measure(self.run, self.task, model, "before", "base model")

    def measure_start(self, model: nn.Module, is_resumed: bool) -> None:
        """Measure the adapted model, where it is more than the base already.

        Args:
            model: With its adapter as training will find it.
            is_resumed: Whether training goes on from a checkpoint.
        """
        run = self.run
        if not run.measures(self.task):
            return
        if run.mix is not None:
            measure(run, self.task, model, "start", "weighted sum")
        if run.start_from is not None and not is_resumed:
            measure(run, self.task, model, "start", "starting adapter")

    def release(self) -> Evaluation | None:
        """Forget the base, and return what was measured of it; None in a process that measured nothing."""
        self.remembered = None
        return self._before
