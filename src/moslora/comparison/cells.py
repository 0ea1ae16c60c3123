"""The cells of a comparison: which there are, how one is trained and measured, and how its result is kept.

A cell is one training: a method, a learning rate, a seed. The base is loaded once; a cell puts its adapter in, trains
with the task's own trainer, is measured, and takes the adapter out again, after which the base's weights must have the
same bits. Several cells may train at once over the one base (``together.py``); each gives what it gives alone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.comparison.methods import Method
from moslora.comparison.together import CannotShare, Surroundings, share, train_together
from moslora.comparison.verdict import Cell
from moslora.display import Display
from moslora.errors import Stopped, TrainingError
from moslora.recipe.schema import Recipe
from moslora.tasks import find_task
from moslora.training.run import StopRequest
from moslora.training.run_directory import write_whole

if TYPE_CHECKING:
    from moslora.tasks.language import LanguageTask

__all__ = [
    "Bench",
    "Comparison",
    "Planned",
    "begin",
    "bury_dead",
    "forget",
    "in_groups",
    "keep",
    "prepare_task",
    "read_cells",
    "run_cells",
    "run_unkept",
]

# A process that died this often in one cell is not sent in again.
DEATHS = 2
# Versions on which a cell's numbers depend; with others a comparison does not go on.
DECISIVE = ("torch", "transformers", "peft", "trl", "moslora")

Planned = tuple[Method, float, int]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        recipe: With the steps asked for.
        methods: In the order asked for, the baseline first in the order of running.
        rates: Learning rates, rising.
        seeds: Shared by all methods.
        baseline: The method that the others are compared with.
        validation: Examples to set aside for choosing rates.
        examples: Held-out examples to judge by; None for all.
        directory: Where it is kept.
    """

    recipe: Recipe
    methods: Sequence[Method]
    rates: Sequence[float]
    seeds: Sequence[int]
    baseline: str
    validation: int
    examples: int | None
    directory: Path

    @property
    def cells(self) -> list[Planned]:
        """Every cell in the order of running: the baseline's middle rate first, as its seeds show the noise."""
        middle = self.rates[len(self.rates) // 2]
        methods = sorted(self.methods, key=lambda m: m.name != self.baseline)
        rates = sorted(self.rates, key=lambda rate: rate != middle)
        return [(m, rate, seed) for m in methods for rate in rates for seed in self.seeds]

    def cell_file(self, method: Method, rate: float, seed: int) -> Path:
        """Where a cell's result is kept."""
        return self.file_of(method.name, rate, seed)

    def file_of(self, name: str, rate: float, seed: int) -> Path:
        """The same by the method's name."""
        return self.directory / "cells" / f"{name}_{rate:g}_{seed}.json"

    def mark(self, cell: Planned) -> Path:
        """Where it is noted that a cell was begun, and how often."""
        return self.cell_file(*cell).with_suffix(".started")


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
    from moslora.tasks.language import LanguageTask

    task: Any = find_task(plan.recipe.task.kind)(plan.recipe, display, check)
    if not isinstance(task, LanguageTask):
        raise ValueError(
            f"task.kind={plan.recipe.task.kind} cannot be compared yet; only text and vision can."
        )
    task.read()
    task.set_aside(plan.validation, plan.examples)
    task.prepare()
    return task


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
        self.fingerprint = _fingerprint(self.model)
        self.alone: set[str] = set()  # methods that were seen not to share the base

    def measure_base(self) -> dict[str, list[float]]:
        """Measure the untrained base on validation and held-out examples."""
        return {
            "validation": self.task.score(self.model, self.task.validation_set, "base, validation"),
            "test": self.task.score(self.model, self.task.heldout_set, "base, held out"),
        }

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
            self._reload()
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
            found = self._train_together(cells)
        finally:
            gc.collect()  # models and trainers know each other
            changed = _fingerprint(self.model) != self.fingerprint
            if changed:
                self._reload()
        if changed:
            raise CannotShare("they left other weights in the base than they found")
        each = (time.monotonic() - started) / len(cells)
        return [dataclasses.replace(cell, cell_seconds=each, together=len(cells)) for cell in found]

    def _train_together(self, cells: Sequence[Planned]) -> list[Cell]:
        if self.plan.recipe.task.kind != "text":
            raise CannotShare("batches with pictures are not laid one upon the other")
        found: dict[Planned, Cell] = {}
        made: dict[Planned, tuple[LanguageTask, Any]] = {}
        surroundings = []
        for cell in cells:
            try:
                made[cell] = self._make(share(self.model), *cell, shows=not made)
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
        if method.library == "none":
            self.model.requires_grad_(True)
        task, trainer = self._make(self.model, method, rate, seed)
        adapted = trainer.model
        _forget_peak(task.device)
        wall, cpu = time.monotonic(), time.process_time()
        trainer.train()
        costs = _Costs(time.monotonic() - wall, time.process_time() - cpu, _peak(task.device))
        self.stop.check()
        cell = self._measure(task, trainer, (method, rate, seed), costs)
        del trainer
        self._take_out(adapted, method)
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
        config = method.configure(task.adapter_arguments(self.model))
        scratch = self.plan.directory / "cells"
        trainer: Any = task.build_trainer(model, config, scratch, [_watcher(self, task.display)])
        trainer.remove_callback(PrinterCallback)
        if method.adjust is not None:
            method.adjust(trainer.model)
        task.display = self.display
        return task, trainer

    def _measure(self, task: LanguageTask, trainer: Any, cell: Planned, costs: _Costs) -> Cell:
        """Measure what a trainer has trained."""
        import torch

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
        broken = next((n for n, p in trained if not torch.isfinite(p).all()), None)
        reason = f"{broken} has NaN or infinite values after training" if broken else None
        found: dict[str, Any] = {}
        if reason is None:
            found["validation"] = task.score(adapted, task.validation_set, f"{name}, validation")
            found["test"] = task.score(adapted, task.heldout_set, f"{name}, held out")
            if not all(map(math.isfinite, (*found["validation"], *found["test"]))):
                reason, found = "a loss after training is NaN or infinite", {}
            elif task.recipe.task.metric != "none" and task.asked:
                found["correct"] = [bool(a.correct) for a in task.ask(adapted, task.asked, name)]
        status = "done" if reason is None else "diverged"
        return Cell(method.name, rate, seed, status, reason, **known, **found)  # type: ignore[arg-type]

    def _take_out(self, adapted: Any, method: Method) -> None:
        """Bring the base back, to the last bit."""
        if method.library != "none":
            _drop_copies(adapted)
            self.model = adapted.unload() if hasattr(adapted, "unload") else adapted.get_base_model()
            if _fingerprint(self.model) == self.fingerprint:
                return
        if not method.changes_base:
            self.display.warn(
                f"{method.name} left other weights in the base than it found; it is loaded anew."
            )
        self._reload()

    def _reload(self) -> None:
        self.model = None
        self.model = self.task.load()
        if _fingerprint(self.model) != self.fingerprint:
            raise TrainingError(
                "The base on disk is not the one that this comparison began with; put the old one back."
            )


@dataclass(frozen=True)
class _Costs:
    """What a training cost, in the names that ``Cell`` has for it."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int | None


def _drop_copies(adapted: Any) -> None:
    """Put the base's own modules in the place of copies that were trained whole, which PEFT would leave in it."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in (m for m in adapted.modules() if isinstance(m, ModulesToSaveWrapper)):
        for name in wrapper.modules_to_save:
            wrapper.modules_to_save[name] = wrapper.original_module


def _crashed(cell: Planned, error: Exception) -> Cell:
    method, rate, seed = cell
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return Cell(method.name, rate, seed, "crashed", f"{type(error).__name__}: {first}")


def _fingerprint(model: Any) -> str:
    """Hash names, shapes and bits of every weight and buffer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _watcher(bench: Bench, display: Display) -> Any:
    """Make the callback that shows progress and obeys a request to stop."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.progress: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.progress = self.stack.enter_context(display.progress("Training", state.max_steps))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            self.progress.advance()
            control.should_training_stop |= bench.stop.received is not None
            return control

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack.close()

    return Watcher()


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


# --- What is kept of them -----------------------------------------------------------------------------------


def in_groups(plan: Comparison, left: Sequence[Planned], together: int) -> list[list[Planned]]:
    """Group cells that are to be trained at once over one base.

    Cells of one method go together, so that a method's time and memory remain its own; groups of a method are as alike
    in size as can be, so that methods remain comparable. Methods that change the base run alone, and so do cells in
    which a process died, so that what one of them did is not laid on the others.

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


def begin(plan: Comparison, cell: Planned) -> None:
    """Note that a cell is begun, one time more than before.

    Args:
        plan: What is compared.
        cell: Which.
    """
    write_whole(plan.mark(cell), str(_begun(plan, cell) + 1))


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
    write_whole(file, json.dumps(dataclasses.asdict(cell), allow_nan=False))
    file.with_suffix(".started").unlink(missing_ok=True)


def forget(plan: Comparison, cell: Planned) -> None:
    """Take a cell's mark away: it is not finished, and nothing died in it.

    Args:
        plan: What is compared.
        cell: Which.
    """
    plan.mark(cell).unlink(missing_ok=True)


def bury_dead(plan: Comparison, display: Display, cells: Sequence[Planned] | None = None) -> None:
    """Count a cell as crashed in which the process died again and again, as for want of memory.

    Args:
        plan: What is compared.
        display: Where to tell of it.
        cells: Which to look at, none of them under way; all of the plan if None.
    """
    for cell in plan.cells if cells is None else cells:
        method, rate, seed = cell
        if plan.cell_file(*cell).exists() or _begun(plan, cell) < DEATHS:
            continue
        reason = f"the process died {DEATHS} times in this cell, perhaps for want of memory"
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
            try:
                cells.append(Cell(**json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged; remove it to have its cell run again.") from error
    return cells
