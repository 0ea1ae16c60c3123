"""A base model on which cells are trained, one after the other or several at once."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.comparison.costs import shares_of
from moslora.comparison.judged import BenchmarkJudge
from moslora.comparison.lanes import CannotShare, Surroundings
from moslora.comparison.methods import Method
from moslora.comparison.plan import Comparison, Planned
from moslora.comparison.together import share_weights, train_together
from moslora.comparison.verdict import Cell
from moslora.core.finite import all_finite
from moslora.display import Display
from moslora.errors import Stopped, TrainingError
from moslora.failures import GO_ON, raise_if_full
from moslora.models.bits import sums_of_bits
from moslora.tasks.text.cost import keep_changed
from moslora.training.bars import closing_bars
from moslora.training.borrowed import borrowed
from moslora.training.stop import StopRequest
from moslora.wording import first_line

if TYPE_CHECKING:
    from moslora.tasks.language import LanguageTask

__all__ = ["Bench"]


class Bench:
    """A base model on which cells are trained, one after the other or several at once.

    Args:
        plan: What is compared.
        task: Its data, prepared.
        display: Where to tell of progress.
        stop: Asked between pieces of work.
    """

    def __init__(self, plan: Comparison, task: LanguageTask, display: Display, stop: StopRequest) -> None:
        self.plan, self.task, self.display, self.stop = plan, task, display, stop
        self.model: Any = task.load()
        self.bits = _bits(self.model)
        self.alone: set[str] = set()  # methods that cannot share the base
        self.judge = BenchmarkJudge.of(plan)

    def turn_to(self, plan: Comparison, task: LanguageTask) -> None:
        """Take another plan of the same comparison, with its data, over the same base."""
        self.plan, self.task = plan, task

    def make_ready(self) -> None:
        """Load the base again, where it was given up for other processes."""
        if self.model is None:
            self._reload()

    def measure_base(self) -> dict[str, Any]:
        """Measure the untrained base on held-out, other and, where rates are tuned, validation examples."""
        self.make_ready()
        found: dict[str, Any] = {"test": self.task.score(self.model, self.task.heldout_set, "base, held out")}
        if self.plan.stage == 1:
            found["validation"] = self.task.score(self.model, self.task.validation_set, "base, validation")
        if self.judge is not None:
            found["correct"] = self.judge.judge(self.task, self.model, "base", self.display)
        if self.task.also:
            costs = self.task.measure_also(self.model, tuned=False)
            found["also"] = shares_of(self.task.also, costs, tuned=False)
        return found

    def run(self, method: Method, rate: float, seed: int) -> Cell:
        """Train and measure one cell. What goes wrong in it is its result, not an exception.

        Raises:
            Stopped: If asked to stop.
            TrainingError: If the base cannot be brought back.
        """
        started = time.monotonic()
        try:
            cell = self._train_and_measure(method, rate, seed)
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:
            cell = _crashed((method, rate, seed), error)
            self._check_base(method)
        return dataclasses.replace(cell, cell_seconds=time.monotonic() - started)

    def run_together(self, cells: Sequence[Planned]) -> list[Cell]:
        """Train several cells at once over the base, and measure each.

        Args:
            cells: Of methods that do not change the base.

        Returns:
            Their results, in order; times are the whole's divided by how many they are.

        Raises:
            CannotShare: If they cannot be trained so, or would not give what each gives alone. Nothing is kept of them.
            Stopped: If asked to stop.
            TrainingError: If the base cannot be brought back.
        """
        started = time.monotonic()
        try:
            with borrowed(self.model):  # copies share its parameters, and what is set on them
                found = self._train_together(cells)
        finally:
            gc.collect()  # models and trainers know each other
            changed = _bits(self.model) != self.bits
            if changed:
                self._reload()
        if changed:
            raise CannotShare("they left other weights in the base than they found")
        each = (time.monotonic() - started) / len(cells)
        return [dataclasses.replace(cell, cell_seconds=each, together=len(cells)) for cell in found]

    def _train_together(self, cells: Sequence[Planned]) -> list[Cell]:
        if self.plan.recipe.task.kind != "text":
            raise CannotShare(f"batches of task={self.plan.recipe.task.kind} are not concatenated")
        found: dict[Planned, Cell] = {}
        made: dict[Planned, tuple[LanguageTask, Any]] = {}
        surroundings = []
        for cell in cells:
            try:
                made[cell] = self._make(share_weights(self.model), *cell, shows=not made)
            except (Stopped, KeyboardInterrupt, CannotShare):
                raise
            except Exception as error:
                found[cell] = _crashed(cell, error)
            else:
                surroundings.append(Surroundings.now())
        trainers = [trainer for _, trainer in made.values()]
        device = self.task.device
        _forget_peak(device)
        wall, cpu = time.monotonic(), time.process_time()
        with closing_bars(*trainers):
            errors = train_together(self.model, trainers, surroundings) if trainers else []
        many = max(1, len(made))
        costs = _Costs((time.monotonic() - wall) / many, (time.process_time() - cpu) / many, _peak(device))
        self.stop.check()
        for (cell, (task, trainer)), own in zip(made.items(), errors, strict=True):
            try:
                if own is not None:
                    raise own
                found[cell] = self._measure(task, trainer, cell, costs)
            except (Stopped, KeyboardInterrupt):
                raise
            except Exception as error:
                found[cell] = _crashed(cell, error)
        return [found[cell] for cell in cells]

    def _train_and_measure(self, method: Method, rate: float, seed: int) -> Cell:
        # TRL and PEFT leave a forward, hooks and flags on a model that they trained; the next cell must find none.
        with borrowed(self.model):
            if method.library == "none":
                self.model.requires_grad_(True)
            task, trainer = self._make(self.model, method, rate, seed)
            _forget_peak(task.device)
            wall, cpu = time.monotonic(), time.process_time()
            with closing_bars(trainer):
                trainer.train()
            costs = _Costs(time.monotonic() - wall, time.process_time() - cpu, _peak(task.device))
            self.stop.check()
            cell = self._measure(task, trainer, (method, rate, seed), costs)
            del trainer
        self._check_base(method)
        return cell

    def _make(
        self, model: Any, method: Method, rate: float, seed: int, shows: bool = True
    ) -> tuple[LanguageTask, Any]:
        """Make a cell's trainer, its adapter in ``model``; of several at once only one shows what it does."""
        from transformers import PrinterCallback

        task = copy.copy(self.task)
        fixed: dict[str, Any] = {"learning_rate": rate, "seed": seed, "data_seed": seed}
        # A cell is short and done again if it is cut off; checkpoints would cost more than they save.
        fixed |= {"save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
        trainer_arguments = {**self.plan.recipe.trainer, **fixed, "load_best_model_at_end": False}
        task.recipe = self.plan.recipe.model_copy(update={"trainer": trainer_arguments, "seed": seed})
        task.display = self.display if shows else Display(quiet=True)
        config = task.completed(method.configure(task.adapter_arguments(self.model)), self.model)
        if task.also:
            task.remembered = keep_changed(model, config, method.changes_base)
        scratch = self.plan.directory / "cells"
        trainer: Any = task.build_trainer(model, config, scratch, [_watcher(self, task.display)])
        trainer.remove_callback(PrinterCallback)
        method.prepare(trainer)
        task.begin(trainer, None)
        task.display = self.display
        return task, trainer

    def _measure(self, task: LanguageTask, trainer: Any, cell: Planned, costs: _Costs) -> Cell:
        """Measure what a trainer has trained."""
        method, rate, seed = cell
        adapted = trainer.model
        trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        name = f"{method.name}, {rate:g}, seed {seed}"
        logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        known: dict[str, Any] = {
            "train_loss": logged[-1] if logged and math.isfinite(logged[-1]) else None,
            **dataclasses.asdict(costs),
            "trainable_parameters": sum(p.numel() for _, p in trained),
        }
        broken = next((n for n, p in trained if not all_finite(p)), None)
        reason = f"{broken} has NaN or infinite values after training" if broken else None
        found: dict[str, Any] = {}
        if reason is None:
            if self.plan.stage == 1:
                found["validation"] = task.score(adapted, task.validation_set, f"{name}, validation")
            found["test"] = task.score(adapted, task.heldout_set, f"{name}, held out")
            if not all(math.isfinite(loss) for losses in found.values() for loss in losses):
                reason, found = "a loss after training is NaN or infinite", {}
            elif self.judge is not None:
                found["correct"] = self.judge.judge(task, adapted, name, self.display)
            elif self.plan.stage == 1 and task.judges and task.asked:
                found["correct"] = [bool(a.correct) for a in task.ask(adapted, task.asked, name)]
        if found and task.also:
            found["also"] = shares_of(task.also, task.measure_also(adapted, task.remembered))
        status = "done" if reason is None else "diverged"
        return Cell(method.name, rate, seed, status, reason, **known, **found)  # type: ignore[arg-type]

    def _check_base(self, method: Method) -> None:
        """See that the base is what it was, to the last bit, or load it anew."""
        if not method.changes_base and _bits(self.model) == self.bits:
            return
        if not method.changes_base:
            self.display.warn(
                f"{method.name} left other weights in the base than it found; it is loaded anew."
            )
        self._reload()

    def _reload(self) -> None:
        self.model = None
        self.model = self.task.load()
        if _bits(self.model) != self.bits:
            raise TrainingError(
                "The base on disk is not the one that this comparison began with; put the old one back."
            )


@dataclass(frozen=True)
class _Costs:
    """What a training cost, in the names that ``Cell`` has for it."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def _crashed(cell: Planned, error: Exception) -> Cell:
    """Return the result of a cell that failed; a full disk is not a method's fault, and is raised."""
    raise_if_full(error, None, GO_ON)
    method, rate, seed = cell
    first = first_line(error)
    return Cell(method.name, rate, seed, "crashed", f"{type(error).__name__}: {first}")


def _bits(model: Any) -> list[Any]:
    """Sum the bits of every weight and buffer, where they are."""
    return list(sums_of_bits(model.state_dict()))


def _watcher(bench: Bench, display: Display) -> Any:
    """Make the callback that shows progress and obeys a request to stop."""
    from moslora.training.callbacks import Bar

    class Watcher(Bar):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            self.progress.advance()
            control.should_training_stop |= bench.stop.received is not None
            return control

    return Watcher(display)


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):  # Linux alone lets a process forget its peak
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: str) -> int | None:
    """Return the peak of memory since it was forgotten: of the GPU, or resident of this process; None if not known."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
        return int(found[1]) * 1024 if found else None
    return None
