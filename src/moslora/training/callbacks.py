"""What a run does at the trainer's steps: metrics, progress, pictures, and obeying a request to stop.

Import this module inside functions: it needs transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from transformers import TrainerCallback

from moslora.display import Display
from moslora.distributed import is_split
from moslora.errors import Stopped, TrainingError
from moslora.tasks.task import Task
from moslora.training.artifacts import save_shown
from moslora.training.at_start import AtStart
from moslora.training.context import RunContext
from moslora.training.metrics_log import MetricsLog

__all__ = ["Bar", "NothingLeft", "Painter", "Recorder", "Rescheduled", "Split"]


# What is not written of the trainer's logs: the step is, by itself, and TRL counts tokens from the start of a process,
# so that a resumed run would tell another number than one that was not interrupted.
NOT_KEPT = ("step", "num_tokens", "eval_num_tokens")


class Bar(TrainerCallback):  # type: ignore[misc]
    """Shows progress; whoever trains closes it, because a trainer that fails does not (``bars.py``).

    Args:
        display: Where.
    """

    def __init__(self, display: Display) -> None:
        self.display = display
        self.stack = contextlib.ExitStack()
        self.progress: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Open the progress bar."""
        steps = state.max_steps - state.global_step
        self.progress = self.stack.enter_context(self.display.progress("Training", steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the progress bar."""
        self.close()

    def close(self) -> None:
        """Close the progress bar, if it is open."""
        self.stack.close()


class Recorder(Bar):
    """Writes metrics, shows progress and obeys a request to stop.

    Args:
        run: The run.
        log: Where metrics go; None in processes that do not keep the run.
    """

    def __init__(self, run: RunContext, log: MetricsLog | None) -> None:
        super().__init__(run.display)
        self.run = run
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write one line of metrics."""
        if self.log is not None:
            self.log.append(state.global_step, **{k: v for k, v in (logs or {}).items() if k not in NOT_KEPT})
        if "loss" in (logs or {}):
            self.progress.note = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Advance the bar, and stop with a checkpoint if any process was asked to."""
        self.progress.advance()
        if self.run.stop.agreed():
            control.should_save = True
            control.should_training_stop = True
        return control


class Rescheduled(TrainerCallback):  # type: ignore[misc]
    """Takes the learning rate of a lengthened schedule from the first step on.

    A checkpoint holds the rate that the old schedule had come to, most often 0, and the trainer would take one step
    at it.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Set the rates to those of the schedule at this step."""
        from moslora.compat.trainer import take_rates_of_schedule

        if optimizer is not None:
            take_rates_of_schedule(optimizer, lr_scheduler)


class NothingLeft(Exception):  # noqa: N818 - nothing is wrong
    """Training is resumed from its last step: the model is ready, and no step is to be taken."""


class Split(TrainerCallback):  # type: ignore[misc]
    """Measures a model that is split between processes before its first step, when the trainer has split it.

    Args:
        start: Measures.
        is_resumed: Whether training goes on from a checkpoint.
    """

    def __init__(self, start: AtStart, is_resumed: bool) -> None:
        self.start = start
        self.is_resumed = is_resumed

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Measure the base, and an adapter that training starts from.

        Raises:
            TrainingError: If the trainer has left the model whole, as accelerate does in silence where it knows no
                device to split on.
        """
        if not is_split(model):
            raise TrainingError(
                "The trainer did not split the model between the processes; nothing was trained."
            )
        self.start.measure_base(model)
        self.start.measure_start(model, self.is_resumed)
        if 0 < state.max_steps <= state.global_step:
            raise NothingLeft


class Painter(TrainerCallback):  # type: ignore[misc]
    """Keeps the pictures that the model makes during training, where the recipe asks for them.

    A request to stop is obeyed between two pictures. The missing ones are made when the run is resumed from that very
    step, before it takes another.

    Args:
        run: The run.
        task: Makes the pictures.
    """

    def __init__(self, run: RunContext, task: Task) -> None:
        self.run = run
        self.task = task

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Make the pictures that an interrupted run did not get to."""
        self.paint(state, model)
        if number := self.run.stop.agreed():
            raise Stopped(number)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        """Make the pictures of this step, if any."""
        if self.paint(state, model) and self.run.stop.agreed():
            control.should_save = True
            control.should_training_stop = True
        return control

    def paint(self, state: Any, model: Any) -> bool:
        """Make what is due, in the first process; return in all of them whether anything was."""
        run, step = self.run, state.global_step
        due = (
            self.task.shows_at(step) and 0 < step < state.max_steps
        )  # the run measures after the last step anyway
        if not due or not run.team.is_main_process or run.stop.received is not None:
            return due
        during = run.directory.read().get("pictures", {}).get("during", {})
        records = list(during.get(str(step), []))
        with contextlib.suppress(Stopped), run.stage("pictures", f"making pictures after step {step}"):
            for shown in self.task.show(model, len(records)):
                record = dataclasses.asdict(save_shown(run, f"{len(records):03d}-step-{step}", shown))
                del record["data"]
                records.append(record)
                run.directory.update(pictures={"during": {str(step): records}})
                if run.stop.received is not None:
                    break
        return True
