"""Compare methods on a user's own data, honestly: paired seeds, tuned learning rates, intervals, and "no difference".

Everything but the method is shared: data, their order, batches, steps, seeds, and the examples that are judged. The
base is loaded once; each cell (a method, a rate, a seed) puts its adapter in, trains with the task's own trainer, is
measured, and takes the adapter out again, after which the base's weights must have the same bits.

```
runs/compare-NAME/
├─ compare.json     what is compared: recipe, methods, rates, seeds, hashes; other inputs are refused
├─ cells/*.json     one per finished cell, written whole; none is run twice
├─ results.json     the verdict, every seed point included
└─ report.html      one page, opens offline
```
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.compare_report import write_comparison_report
from moslora.methods import Method, find_method
from moslora.models import default_device
from moslora.recipe import Recipe, load_recipe, resolve_trainer_arguments
from moslora.rundir import collect_hardware, collect_versions, write_whole
from moslora.tasks import find_task
from moslora.train import Stopped, StopRequest, TrainingError
from moslora.verdict import Cell, Verdict, foresee, judge

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.tasks.text import TextTask

__all__ = ["Comparison", "compare"]

SCHEMA_VERSION = 1
# Examples set aside to choose a learning rate by.
VALIDATION = 64
# Tried where the user names no rates: these times the recipe's.
RATE_FACTORS = (1 / 3, 1.0, 3.0)
# A process that died this often in one cell is not sent in again.
DEATHS = 2
# Versions on which a cell's numbers depend; with others a comparison does not go on.
DECISIVE = ("torch", "transformers", "peft", "trl", "moslora")


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
    def cells(self) -> list[tuple[Method, float, int]]:
        """Every cell in the order of running: the baseline's middle rate first, as its seeds show the noise."""
        middle = self.rates[len(self.rates) // 2]
        methods = sorted(self.methods, key=lambda m: m.name != self.baseline)
        rates = sorted(self.rates, key=lambda rate: rate != middle)
        return [(m, rate, seed) for m in methods for rate in rates for seed in self.seeds]

    def cell_file(self, method: Method, rate: float, seed: int) -> Path:
        """Where a cell's result is kept."""
        return self.directory / "cells" / f"{method.name}_{rate:g}_{seed}.json"


def compare(
    arguments: Sequence[str],
    display: Display,
    *,
    methods: Sequence[str] = ("lora", "moslora"),
    seeds: int = 3,
    rates: Sequence[float] = (),
    baseline: str | None = None,
    steps: int | None = None,
    validation: int = VALIDATION,
    examples: int | None = None,
    out: Path | None = None,
    workers: int = 1,
    command: str = "",
    plan_only: bool = False,
) -> tuple[Path, Verdict | None]:
    """Compare methods, or go on with a comparison that was stopped.

    Args:
        arguments: A recipe and/or ``section.key=value``, as for training.
        display: Where to tell of progress.
        methods: Keys of ``METHODS`` or paths of PEFT configurations.
        seeds: How many, at least 2.
        rates: Learning rates to try for every method; none for a third of the recipe's, the same and three times it.
        baseline: Compared with all others; the first method if None.
        steps: Optimiser steps of every cell; None for the recipe's.
        validation: About how many training examples to set aside for choosing rates.
        examples: Held-out examples to judge by; None for all.
        out: The comparison's folder; ``compare-NAME`` beside the recipe's runs if None.
        workers: Processes that train cells side by side, each with its own copy of the base.
        command: How it was called, to be kept.
        plan_only: Only say what would be done, and leave nothing on disk.

    Returns:
        The folder, and the verdict; None with ``plan_only``.

    Raises:
        ValueError: If arguments, recipe, data or model cannot be used, or the folder holds another comparison.
        TrainingError: If the base changes in a way that cannot be undone, or a worker dies.
        Stopped: If it was asked to stop; the same command goes on.
    """
    plan = _plan(arguments, methods, seeds, rates, baseline, steps, validation, examples, out)
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1.")
    with StopRequest(display) as stop:
        task = _prepare(plan, display, stop.check)
        _say_plan(plan, task, display)
        if plan_only:
            return plan.directory, None
        with _claimed(plan, task, display, command):
            try:
                _run_all(plan, task, display, stop, workers)
            except (Stopped, KeyboardInterrupt) as stopped:
                number = stopped.signal_number if isinstance(stopped, Stopped) else signal.SIGINT
                done = sum(plan.cell_file(*cell).exists() for cell in plan.cells)
                display.say(
                    f"Interrupted with {done} of {len(plan.cells)} cells finished; the same command goes on."
                )
                raise Stopped(number) from stopped
            verdict = _conclude(plan, display)
    return plan.directory, verdict


# --- What shall be compared ---------------------------------------------------------------------------------


def _plan(
    arguments: Sequence[str],
    methods: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    baseline: str | None,
    steps: int | None,
    validation: int,
    examples: int | None,
    out: Path | None,
) -> Comparison:
    recipe = load_recipe(list(arguments))
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1.")
        recipe = recipe.model_copy(update={"trainer": {**recipe.trainer, "max_steps": steps}})
    found = [find_method(name) for name in methods]
    names = [method.name for method in found]
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError(f"methods={','.join(names)} must name at least two, none of them twice.")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise ValueError(f"baseline={baseline!r} is none of the methods compared: {', '.join(names)}.")
    if seeds < 2:
        raise ValueError(f"seeds={seeds} shows no noise between seeds; take at least 2, better 3 to 5.")
    if validation < 2 or (examples is not None and examples < 2):
        raise ValueError("At least 2 validation and 2 held-out examples are needed.")
    if not rates:
        middle = float(resolve_trainer_arguments(recipe, default_device())["learning_rate"])
        rates = [float(f"{middle * factor:.2g}") for factor in RATE_FACTORS]
    if any(not (0 < rate < math.inf) for rate in rates) or len({f"{rate:g}" for rate in rates}) != len(rates):
        raise ValueError(f"Learning rates {list(rates)} must be positive and all different.")
    for method in found:
        method.configure(recipe.adapter)  # says now what it would say after an hour
    name = recipe.output.name or recipe.task.kind
    folder = Path(out) if out is not None else Path(recipe.output.dir) / f"compare-{name}"
    return Comparison(
        recipe=recipe,
        methods=found,
        rates=sorted(rates),
        seeds=[recipe.seed + index for index in range(seeds)],
        baseline=baseline,
        validation=validation,
        examples=examples,
        directory=folder.absolute(),
    )


def _prepare(plan: Comparison, display: Display, check: Callable[[], None]) -> TextTask:
    """Read and encode the data; refuse what cannot be compared."""
    task: Any = find_task(plan.recipe.task.kind)(plan.recipe, display, check)
    if plan.recipe.task.kind != "text":
        raise ValueError(f"task.kind={plan.recipe.task.kind} cannot be compared yet; only text can.")
    task.read()
    task.set_aside(plan.validation, plan.examples)
    task.prepare()
    return task  # type: ignore[no-any-return]


def _say_plan(plan: Comparison, task: TextTask, display: Display) -> None:
    """Say how much there is to do, and how small a difference it could show, before any of it is done."""
    from moslora.intervals import detectable_difference

    seeds, examples = len(plan.seeds), len(task.heldout_set)
    arguments = resolve_trainer_arguments(plan.recipe, task.device)
    steps = arguments.get("max_steps", -1)
    length = f"{steps} steps" if steps > 0 else f"{arguments['num_train_epochs']:g} epochs"
    names = ", ".join(method.name for method in plan.methods)
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    display.say(
        f"Comparing {names}; the baseline is {plan.baseline}. {len(plan.methods)} methods × {len(plan.rates)} learning "
        f"rates ({rates}) × {seeds} seeds = {len(plan.cells)} cells of {length}. Rates are chosen on "
        f"{len(task.validation_set)} examples taken out of the training data, methods judged on {examples} held out."
    )
    others = len(plan.methods) - 1
    of_seeds = detectable_difference(1, 0, seeds, examples, comparisons=others)
    of_examples = detectable_difference(0, 1, seeds, examples, comparisons=others)
    display.say(
        f"Such a comparison can show a difference of about {of_seeds:.2g} times what differences vary between seeds, "
        f"or {of_examples:.2g} times what they vary between examples, whichever is larger. The figure follows when the "
        "baseline's first seeds are done, and the time it takes after the first cell."
    )


def _identity(plan: Comparison, task: TextTask) -> dict[str, Any]:
    """Everything on which a cell's numbers depend."""
    configs = {}
    for method in plan.methods:
        config = method.configure(plan.recipe.adapter)
        configs[method.name] = {"library": method.library, "config": config and config.to_dict()}
    versions = collect_versions()
    identity = {
        "recipe": plan.recipe.model_dump(exclude={"output"}),
        "trainer": resolve_trainer_arguments(plan.recipe, task.device),
        "methods": configs,
        "learning_rates": list(plan.rates),
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "sizes": [len(task.train_set), len(task.validation_set), len(task.heldout_set)],
        "hashes": task.hashes(),
        "versions": {name: versions[name] for name in DECISIVE},
    }
    return json.loads(json.dumps(identity, default=_as_json))  # type: ignore[no-any-return]


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


@contextlib.contextmanager
def _claimed(plan: Comparison, task: TextTask, display: Display, command: str) -> Iterator[None]:
    """Make or reopen the folder, as the only process at work in it."""
    folder, record = plan.directory, plan.directory / "compare.json"
    identity = _identity(plan, task)
    if folder.exists() and not record.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something that is no comparison; name another folder with --out.")
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if record.exists():
            try:
                old = json.loads(record.read_text(encoding="utf-8"))["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{record} is damaged; name another folder with --out.") from error
            changed = [name for name in identity if old.get(name) != identity[name]]
            if changed:
                raise ValueError(
                    f"{folder} holds a comparison with other {', '.join(changed)}. Go on with those, or name another "
                    "folder with --out. (Adding seeds or methods after seeing a result would make findings by chance "
                    "likelier than the intervals say.)"
                )
            done = sum(plan.cell_file(*cell).exists() for cell in plan.cells)
            display.say(f"Going on with {folder}: {done} of {len(plan.cells)} cells are finished.")
        else:
            about = {"schema_version": SCHEMA_VERSION, "command": command, "hardware": collect_hardware()}
            document = {**about, "versions": collect_versions(), "identity": identity}
            write_whole(record, json.dumps(document, indent=2, ensure_ascii=False))
            display.say(f"Comparison: {folder}")
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows; there the user has to see to it
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another process is at work in {folder}; wait for it, or name another."
            ) from None
        except OSError:  # some network file systems cannot lock
            pass
        yield
    finally:
        os.close(descriptor)


# --- Cells --------------------------------------------------------------------------------------------------


class Bench:
    """A base model on which cells are trained one after the other.

    Args:
        plan: What is compared.
        task: Its data, prepared.
        display: Where to tell of progress.
        stop: Asked between pieces of work.
    """

    def __init__(self, plan: Comparison, task: TextTask, display: Display, stop: StopRequest) -> None:
        self.plan, self.task, self.display, self.stop = plan, task, display, stop
        self.model: Any = task.load()
        self.fingerprint = _fingerprint(self.model)

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
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            cell = Cell(method.name, rate, seed, "crashed", f"{type(error).__name__}: {first}")
            self._reload()
        return dataclasses.replace(cell, cell_seconds=time.monotonic() - started)

    def _train_and_measure(self, method: Method, rate: float, seed: int) -> Cell:
        import torch
        from transformers import PrinterCallback

        task = copy.copy(self.task)
        fixed: dict[str, Any] = {"learning_rate": rate, "seed": seed, "data_seed": seed}
        # A cell is short and done again if it is cut off; checkpoints would cost more than they save.
        fixed |= {"save_strategy": "no", "eval_strategy": "no", "report_to": "none"}
        trainer_arguments = {**self.plan.recipe.trainer, **fixed, "load_best_model_at_end": False}
        task.recipe = self.plan.recipe.model_copy(update={"trainer": trainer_arguments, "seed": seed})
        if method.library == "none":
            self.model.requires_grad_(True)
        config = method.configure(self.plan.recipe.adapter)
        scratch = self.plan.directory / "cells"
        trainer: Any = task.build_trainer(self.model, config, scratch, [_watcher(self)])
        trainer.remove_callback(PrinterCallback)
        adapted = trainer.model
        if method.adjust is not None:
            method.adjust(adapted)
        trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
        count = sum(p.numel() for _, p in trained)
        name = f"{method.name}, {rate:g}, seed {seed}"
        _forget_peak(task.device)
        wall, cpu = time.monotonic(), time.process_time()
        trainer.train()
        seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
        peak = _peak(task.device)
        self.stop.check()
        logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        known: dict[str, Any] = {
            "train_loss": logged[-1] if logged and math.isfinite(logged[-1]) else None,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": peak,
            "trainable_parameters": count,
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
        del trainer
        self._take_out(adapted, method)
        status = "done" if reason is None else "diverged"
        return Cell(method.name, rate, seed, status, reason, **known, **found)  # type: ignore[arg-type]

    def _take_out(self, adapted: Any, method: Method) -> None:
        """Bring the base back, to the last bit."""
        if method.library != "none":
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


def _fingerprint(model: Any) -> str:
    """Hash names, shapes and bits of every weight and buffer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _watcher(bench: Bench) -> Any:
    """Make the callback that shows progress and obeys a request to stop."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.stack = contextlib.ExitStack()
            self.progress: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.progress = self.stack.enter_context(bench.display.progress("Training", state.max_steps))

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


# --- Running them -------------------------------------------------------------------------------------------


def _run_all(plan: Comparison, task: TextTask, display: Display, stop: StopRequest, workers: int) -> None:
    """Run the cells that are not finished, and the base."""
    base = plan.directory / "cells" / "base.json"
    _bury_dead(plan, display)
    left = [cell for cell in plan.cells if not plan.cell_file(*cell).exists()]
    if not left and base.exists():
        return
    stop.check()
    bench = Bench(plan, task, display, stop)
    _check_room(plan, bench, task.device)
    if not base.exists():
        write_whole(base, json.dumps(bench.measure_base()))
    if workers > 1 and len(left) > 1:
        del bench
        _run_in_processes(plan, left, display, stop, workers)
        return
    for index, cell in enumerate(left):
        stop.check()
        _say_cell(plan, run_cell(bench, *cell), len(left) - index - 1, 1, display)


def run_cell(bench: Bench, method: Method, rate: float, seed: int) -> Cell:
    """Run a cell and keep its result, with a mark beside it for as long as it runs.

    Args:
        bench: Where.
        method, rate, seed: Which.

    Returns:
        The cell, written.
    """
    file = bench.plan.cell_file(method, rate, seed)
    mark = file.with_suffix(".started")
    deaths = int(mark.read_text(encoding="ascii")) if mark.exists() else 0
    write_whole(mark, str(deaths + 1))
    try:
        cell = bench.run(method, rate, seed)
    except BaseException:
        mark.unlink(missing_ok=True)  # this process lives, so it was no death
        raise
    write_whole(file, json.dumps(dataclasses.asdict(cell), allow_nan=False))
    mark.unlink(missing_ok=True)
    return cell


def _bury_dead(plan: Comparison, display: Display) -> None:
    """Count a cell as crashed in which the process died again and again, as for want of memory."""
    for method, rate, seed in plan.cells:
        file = plan.cell_file(method, rate, seed)
        mark = file.with_suffix(".started")
        if file.exists() or not mark.exists() or int(mark.read_text(encoding="ascii")) < DEATHS:
            continue
        reason = f"the process died {DEATHS} times in this cell, perhaps for want of memory"
        write_whole(file, json.dumps(dataclasses.asdict(Cell(method.name, rate, seed, "crashed", reason))))
        mark.unlink()
        display.warn(f"{method.name}, {rate:g}, seed {seed}: {reason}.")


def _say_cell(plan: Comparison, cell: Cell, left: int, workers: int, display: Display) -> None:
    """Tell of a finished cell; after the first how long the rest takes, after the first seeds what could be seen."""
    from statistics import fmean

    what = f"{cell.method}, rate {cell.learning_rate:g}, seed {cell.seed}"
    if cell.validation is not None and cell.test is not None:
        display.say(
            f"{what}: validation loss {fmean(cell.validation):.4f}, held out {fmean(cell.test):.4f}; "
            f"{cell.cell_seconds:.0f} s."
        )
    else:
        display.warn(f"{what} {cell.status}: {cell.reason}.")
    done = _read_cells(plan)
    if left:
        mean = fmean([c.cell_seconds for c in done if c.cell_seconds] or [0.0])
        display.say(f"  {left} cells left, about {_duration(mean * left / workers)}.")
    first = [c for c in done if (c.method, c.learning_rate) == (plan.baseline, plan.cells[0][1])]
    if len(first) == len(plan.seeds) and cell in first:
        size = foresee(first, len(plan.seeds), len(plan.methods) - 1)
        if size is not None:
            display.say(
                f"By the spread of {plan.baseline}'s seeds, this comparison can show a difference in held-out loss of "
                f"about {size:.2g}, four times out of five; of less if seeds move the methods alike. For a smaller "
                "one take more seeds (--seeds) or examples (--examples)."
            )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _check_room(plan: Comparison, bench: Bench, device: str) -> None:
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
        raise ValueError(
            f"Method full needs about {needed / 1e9:.1f} GB beside the base, and {free / 1e9:.1f} GB are free. Leave "
            "it out of --methods."
        )


def _read_cells(plan: Comparison) -> list[Cell]:
    cells = []
    for cell in plan.cells:
        file = plan.cell_file(*cell)
        if file.exists():
            try:
                cells.append(Cell(**json.loads(file.read_text(encoding="utf-8"))))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{file} is damaged; remove it to have its cell run again.") from error
    return cells


def _conclude(plan: Comparison, display: Display) -> Verdict:
    """Judge, write results and report, and tell."""
    base = json.loads((plan.directory / "cells" / "base.json").read_text(encoding="utf-8"))
    names = [method.name for method in plan.methods]
    verdict = judge(_read_cells(plan), names, plan.baseline, base["validation"], base["test"])
    write_whole(
        plan.directory / "results.json",
        json.dumps(dataclasses.asdict(verdict), indent=2, ensure_ascii=False, allow_nan=False),
    )
    try:
        write_comparison_report(plan.directory, {m.name: m.about for m in plan.methods})
    except Exception as error:  # it shows a comparison and must not decide one
        display.warn(f"The report could not be written: {error}")
    _show(verdict, display)
    display.say(f"Results, for programs:        {plan.directory / 'results.json'}")
    display.say(f"Report, opens in a browser:   {plan.directory / 'report.html'}")
    return verdict


def _show(verdict: Verdict, display: Display) -> None:
    rows = []
    for result in verdict.methods:
        interval = "{:.4f} to {:.4f}".format(*result.interval) if result.interval else ""
        stable = "{:g} to {:g}".format(*result.stable) if result.stable else "–"
        best = [p for p in result.points if p.learning_rate == result.best_rate]
        rows.append(
            [
                result.name,
                "–" if result.best_rate is None else f"{result.best_rate:g}",
                "–" if result.score is None else f"{result.score:.4f}",
                interval,
                " ".join(f"{p.test:.4f}" for p in best if p.test is not None),
                *([] if not _asks(verdict) else [_share(result.exact_match)]),
                stable,
                f"{result.diverged} / {result.crashed}",
                "–" if result.trainable_parameters is None else f"{result.trainable_parameters:,}",
                "–" if result.seconds is None else f"{result.seconds:.1f} s",
                "–" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f} GB",
            ]
        )
    asked = ["exact match"] if _asks(verdict) else []
    columns = ["", "best rate", "held-out loss", "95 % over seeds", "each seed", *asked, "stable rates"]
    columns += ["diverged / crashed", "trained", "time", "peak memory"]
    display.say()
    display.table(f"Base without training: held-out loss {verdict.base_loss:.4f}", columns, rows)
    for contrast in verdict.contrasts:
        if contrast.measure == "exact_match":
            found = contrast.difference
            display.say(
                f"Exact match, {contrast.method} less {contrast.baseline}: {found.mean:+.1%} (95 % interval "
                f"{found.low:+.1%} to {found.high:+.1%}, corrected p = {contrast.p_corrected:.2g})."
            )
    for sentence in verdict.sentences:
        display.say(sentence, style="bold")
    for caution in verdict.cautions:
        display.say(f"Note: {caution}")


def _asks(verdict: Verdict) -> bool:
    return any(result.exact_match is not None for result in verdict.methods)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


# --- In several processes -----------------------------------------------------------------------------------

_bench: Bench | None = None  # of this process


def _run_in_processes(
    plan: Comparison,
    left: Sequence[tuple[Method, float, int]],
    display: Display,
    stop: StopRequest,
    workers: int,
) -> None:
    """Run cells side by side, each process with its own copy of the base and its share of the cores."""
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    workers = min(workers, len(left))
    threads = max(1, collect_hardware()["cores"] // workers)
    about = dataclasses.replace(plan, methods=())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(about, threads),
    )
    try:
        waiting = {
            pool.submit(_run_in_worker, method.origin or method.name, rate, seed): (method, rate, seed)
            for method, rate, seed in left
        }
        rest = len(left)
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                waiting.pop(future)
                rest -= 1
                _say_cell(plan, future.result(), rest, workers, display)
            if stop.received is not None:
                display.say("Waiting for the cells under way.")
                pool.shutdown(wait=True, cancel_futures=True)
                stop.check()
    except BrokenProcessPool as broken:
        raise TrainingError(
            "A worker process died, perhaps for want of memory. Run the same command with fewer --workers; finished "
            f"cells are kept, and a cell in which a process dies {DEATHS} times counts as crashed."
        ) from broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(plan: Comparison, threads: int) -> None:
    global _bench
    import torch

    from moslora.display import Display

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a cell under way is finished
    torch.set_num_threads(threads)
    display = Display(quiet=True)
    stop = StopRequest(display)
    _bench = Bench(plan, _prepare(plan, display, stop.check), display, stop)


def _run_in_worker(method: str, rate: float, seed: int) -> Cell:
    assert _bench is not None
    return run_cell(_bench, find_method(method), rate, seed)
