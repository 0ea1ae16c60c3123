"""Compare methods on a user's own data, honestly: paired seeds, tuned learning rates, intervals, and "no difference".

Everything but the method is shared: data, their order, batches, steps, seeds, and the examples that are judged.
``cells.py`` has the trainings, ``runners.py`` where they run, ``verdict.py`` what follows from them.

```
runs/compare-NAME/
├─ compare.json     what is compared: recipe, methods, rates, seeds, hashes; other inputs are refused
├─ cells/*.json     one per finished cell, written whole; none is run twice
├─ confirm.json     the second stage, if there is one: confirm.py
├─ confirm/*.json   its cells
├─ results.json     the verdict, every seed point included
└─ report.html      one page, opens offline
```
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.comparison.cell_files import read_cells
from moslora.comparison.cells import prepare_task
from moslora.comparison.confirm import SecondStage, Wanted, check_wanted
from moslora.comparison.costs import with_costs
from moslora.comparison.given import of_methods, read_rates
from moslora.comparison.judged import BenchmarkJudge
from moslora.comparison.methods import default_methods, find_method
from moslora.comparison.plan import DECISIVE, Comparison, Engine
from moslora.comparison.results import Given, Verdict
from moslora.comparison.runners import make_engine, run_all
from moslora.comparison.showing import show_verdict
from moslora.comparison.verdict import judge
from moslora.display import Display
from moslora.errors import Stopped, UsageError
from moslora.files import locked, remove, write_text
from moslora.models.loading import default_device
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import SHIPPED, EvaluationSection, Recipe
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.reports.comparison import write_comparison_report
from moslora.training.provenance import collect_hardware, collect_versions
from moslora.training.stop import StopRequest
from moslora.training.trainer_parts import try_trainer_parts

if TYPE_CHECKING:
    from moslora.tasks.language import LanguageTask

__all__ = ["compare"]

COMPARISON_SCHEMA_VERSION = 1
# Examples set aside to choose a learning rate by.
VALIDATION = 64
# Tried where the user names no rates: these times the recipe's.
RATE_FACTORS = (1 / 3, 1.0, 3.0)


def compare(
    recipe: Recipe | Sequence[str],
    display: Display,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    rates: Sequence[float] = (),
    baseline: str | None = None,
    steps: int | None = None,
    validation: int = VALIDATION,
    examples: int | None = None,
    benchmark: Path | None = None,
    benchmark_as: str | None = None,
    out: Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    together: int = 1,
    contrasts: Sequence[str] = (),
    rates_from: str | Path | Mapping[str, float] | None = None,
    confirm: int | None = None,
    width: float | None = None,
    off_rates: Sequence[float] = (),
    off_seeds: int | None = None,
    command: str = "",
    plan_only: bool = False,
) -> tuple[Path, Verdict | None]:
    """Compare methods, or continue with a comparison that was stopped.

    Args:
        recipe: A checked recipe; or a recipe's path and/or ``section.key=value``, as for training.
        display: Where to tell of progress.
        methods: Keys of ``METHODS`` or paths of PEFT configurations; None for LoRA and the default mixer.
        seeds: How many, at least 2.
        rates: Learning rates to try for every method; none for a third of the recipe's, the same and three times it.
        baseline: Compared with all others; the first method if None.
        steps: Optimizer steps of every cell; None for the recipe's.
        validation: About how many training examples to set aside for choosing rates.
        examples: Held-out examples to judge by; None for all.
        benchmark: File of a vision-language benchmark whose questions judge the methods, instead of the recipe's
            metric.
        benchmark_as: Which benchmark it is, where the file does not tell.
        out: The comparison's folder; ``compare-NAME`` beside the recipe's runs if None.
        engine: A key of ``ENGINES``: processes on this machine, or a Ray cluster.
        workers: Processes that train cells side by side, each with its own copy of the base; None for one, or with Ray
            for as many as it has GPUs.
        together: Cells that a process trains at once over one copy of the base; each gives what it gives alone.
        contrasts: Pairs to compare beside each method with the baseline, as ``moslora:frozen-mixer``.
        rates_from: Rates that were tuned elsewhere: a comparison's folder or ``results.json``, or ``lora=0.003,…``;
            methods without one are tuned here.
        confirm: Fresh seeds to confirm the methods on, each at its best rate; with ``width`` at most. None for no
            second stage, or with ``width`` for 100.
        width: Fresh seeds are added until each interval is no wider than ± this, in nats per token.
        off_rates: Multiples of each method's best rate at which it is trained, too, to see what they cost.
        off_seeds: On how many of the fresh seeds; None for all, or with ``width`` for the first 8.
        command: How it was called, to be kept.
        plan_only: Only say what would be done, and leave nothing on disk.

    Returns:
        The folder, and the verdict; None with ``plan_only``.

    Raises:
        ValueError: If arguments, recipe, data or model cannot be used, or the folder holds another comparison.
        BusyError: If another process is at work in the folder.
        TrainingError: If the base changes in a way that cannot be undone, or a worker dies.
        Stopped: If it was asked to stop; the same command continues.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(list(recipe))
    wanted = check_wanted(confirm, width, off_rates, off_seeds)
    given = Given() if rates_from is None else read_rates(rates_from)
    plan = _plan(recipe, methods, seeds, rates, baseline, steps, validation, examples, out, given, contrasts)
    plan = _as_begun(plan, display)
    if given.rates and wanted is None and not SecondStage.was_begun(plan):
        raise UsageError("rates_from spares tuning only; add confirm (--confirm N) to train at these rates.")
    if benchmark_as is not None and benchmark is None:
        raise UsageError("--as names the benchmark of --benchmark FILE, which is missing.")
    plan = dataclasses.replace(
        plan, benchmark=None if benchmark is None else Path(benchmark).absolute(), benchmark_as=benchmark_as
    )
    BenchmarkJudge.of(plan)  # a file that cannot be used is told before the data are read
    chosen = make_engine(engine, workers, together)
    with StopRequest(display) as stop:
        task = prepare_task(plan, display, stop.check)
        try_trainer_parts(plan.recipe, task.device)
        _say_plan(plan, task, display)
        if plan_only:
            _say_second_stage(plan, task, wanted, chosen, display)
            return plan.directory, None
        with _claimed(plan, task, display, command):
            try:
                verdict = _run(plan, task, display, stop, chosen, wanted, command)
            except (Stopped, KeyboardInterrupt) as stopped:
                number = stopped.signal_number if isinstance(stopped, Stopped) else signal.SIGINT
                done = sum(plan.cell_file(*cell).exists() for cell in plan.cells)
                second = len(list(plan.directory.glob("confirm/*_*.json")))
                also = f" and {second} of the second stage" if second else ""
                display.say(
                    f"Interrupted with {done} of {len(plan.cells)} cells{also} finished; the same command continues."
                )
                raise Stopped(number) from stopped
    return plan.directory, verdict


def _as_begun(plan: Comparison, display: Display) -> Comparison:
    """Leave out what tuning costs where a comparison was begun by a version that did not measure it."""
    try:
        begun = json.loads((plan.directory / "compare.json").read_text(encoding="utf-8"))["identity"][
            "recipe"
        ]
        is_older = "evaluation" not in begun
    except (OSError, ValueError, KeyError, TypeError):
        return plan  # there is none, or it is refused later
    if not is_older or plan.recipe.evaluation.also != [SHIPPED]:
        return plan
    display.say(f"{plan.directory} was begun without evaluation.also, and is continued without it.")
    recipe = plan.recipe.model_copy(update={"evaluation": EvaluationSection(also=[])})
    return dataclasses.replace(plan, recipe=recipe)


def _run(
    plan: Comparison,
    task: LanguageTask,
    display: Display,
    stop: StopRequest,
    engine: Engine,
    wanted: Wanted | None,
    command: str,
) -> Verdict:
    """Run what is missing of both stages, and judge them."""
    bench = run_all(plan, task, display, stop, engine) if plan.cells else None
    verdict = _judge(plan)
    if wanted is None:
        second = SecondStage.of(plan, verdict, display) if SecondStage.was_begun(plan) else None
        if second is not None:
            verdict = dataclasses.replace(verdict, confirmation=second.judge(verdict.judged_by))
            if verdict.confirmation is None:
                display.warn(
                    "A second stage was begun and is not finished; --confirm or --width continues it."
                )
        return _conclude(plan, verdict, display)
    second = SecondStage.of(plan, verdict, display)
    if not second.asked(plan.pairs):
        display.warn("No two methods that are compared have a rate, so there is nothing to confirm.")
        return _conclude(plan, verdict, display)
    if plan.cells:  # of an interrupted second stage the first is there to be read
        _write(plan, dataclasses.replace(verdict, confirmation=second.judge(verdict.judged_by)), display)
        if not second.was_begun(plan):
            show_verdict(verdict, display)
    own = task if plan.examples is None else prepare_task(second.plan, Display(quiet=True), stop.check)
    second.run(wanted, verdict, own, stop, engine, bench, command)
    if not plan.cells:
        verdict = _judge(plan)  # now that there is a base to compare with
    verdict = dataclasses.replace(verdict, confirmation=second.judge(verdict.judged_by))
    return _conclude(plan, verdict, display)


# --- What is compared ---------------------------------------------------------------------------------------


def _plan(
    recipe: Recipe,
    methods: Sequence[str] | None,
    seeds: int,
    rates: Sequence[float],
    baseline: str | None,
    steps: int | None,
    validation: int,
    examples: int | None,
    out: Path | None,
    given: Given | None = None,
    contrasts: Sequence[str] = (),
) -> Comparison:
    if recipe.parallel.kind not in ("auto", "ddp"):
        raise UsageError(
            f"parallel.kind={recipe.parallel.kind}: a comparison trains in one process; leave it out."
        )
    if steps is not None:
        if steps < 1:
            raise UsageError(f"steps={steps} must be at least 1.")
        recipe = recipe.model_copy(update={"trainer": {**recipe.trainer, "max_steps": steps}})
    name = recipe.output.name or recipe.task.kind
    folder = Path(out) if out is not None else Path(recipe.output.dir) / f"compare-{name}"
    found = [find_method(name) for name in (default_methods(folder) if methods is None else methods)]
    names = [method.name for method in found]
    if len(set(names)) != len(names) or len(names) < 2:
        raise UsageError(f"methods={','.join(names)} must name at least two, none of them twice.")
    baseline = names[0] if baseline is None else baseline
    if baseline not in names:
        raise UsageError(f"baseline={baseline!r} is none of the methods compared: {', '.join(names)}.")
    given = of_methods(given or Given(), names)
    if len(given.rates) == len(names):
        if rates:
            raise UsageError("rates_from has a rate of every method, so learning rates would be ignored.")
        seeds = 0
    elif seeds < 2:
        raise UsageError(f"seeds={seeds} shows no noise between seeds; take at least 2, better 3 to 5.")
    if validation < 2 or (examples is not None and examples < 2):
        raise UsageError("At least 2 validation and 2 held-out examples are needed.")
    if not rates and seeds:
        middle = float(resolve_trainer_arguments(recipe, default_device())["learning_rate"])
        rates = [float(f"{middle * factor:.2g}") for factor in RATE_FACTORS]
    if any(not (0 < rate < math.inf) for rate in rates) or len({f"{rate:g}" for rate in rates}) != len(rates):
        raise UsageError(f"Learning rates {list(rates)} must be positive and all different.")
    for method in found:
        method.configure(recipe.adapter)  # says now what it would say after an hour
    return Comparison(
        recipe=recipe,
        methods=found,
        rates=sorted(rates),
        seeds=[recipe.seed + index for index in range(seeds)],
        baseline=baseline,
        validation=validation,
        examples=examples,
        directory=folder.absolute(),
        given=given,
        contrasts=_pairs(contrasts, names, baseline),
    )


def _pairs(contrasts: Sequence[str], names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    """Read contrasts as ``METHOD:METHOD``; those with the baseline are made anyway."""
    found: list[tuple[str, str]] = []
    for text in contrasts:
        ways = [(one, two) for one in names for two in names if f"{one}:{two}" == text and one != two]
        if not ways:
            raise UsageError(
                f"contrasts has {text!r}, which is not two of the methods compared joined by a colon: "
                f"{', '.join(names)}."
            )
        if baseline == ways[0][0]:
            raise UsageError(
                f"contrasts has {text!r}: every method is compared with the baseline {baseline} already."
            )
        if ways[0][::-1] in found:
            raise UsageError(f"contrasts has {text!r} both ways round; once is enough.")
        found.append(ways[0])
    return list(dict.fromkeys(found))


def _say_plan(plan: Comparison, task: LanguageTask, display: Display) -> None:
    """Say how much there is to do, and how small a difference it could show, before any of it is done."""
    from moslora.metrics.intervals import detectable_difference

    if plan.given.rates:
        known = ", ".join(f"{name} {rate:g}" for name, rate in plan.given.rates.items())
        display.say(f"Rates tuned elsewhere ({plan.given.source}): {known}.")
    if not plan.tuned:
        return
    seeds, examples = len(plan.seeds), len(task.heldout_set)
    arguments = resolve_trainer_arguments(plan.recipe, task.device)
    steps = arguments.get("max_steps", -1)
    length = f"{steps} steps" if steps > 0 else f"{arguments['num_train_epochs']:g} epochs"
    names = ", ".join(method.name for method in plan.tuned)
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    display.say(
        f"Comparing {names}; the baseline is {plan.baseline}. {len(plan.tuned)} methods × {len(plan.rates)} learning "
        f"rates ({rates}) × {seeds} seeds = {len(plan.cells)} cells of {length}. Rates are chosen on "
        f"{len(task.validation_set)} examples taken out of the training data, methods judged on {examples} held out."
    )
    others = len(plan.pairs)
    of_seeds = detectable_difference(1, 0, seeds, examples, comparisons=others)
    of_examples = detectable_difference(0, 1, seeds, examples, comparisons=others)
    display.say(
        f"Such a comparison can show a difference of about {of_seeds:.2g} times what differences vary between seeds, "
        f"or {of_examples:.2g} times what they vary between examples, whichever is larger. The figure follows when the "
        "baseline's first seeds are done, and the time it takes after the first cell."
    )


def _identity(plan: Comparison, task: LanguageTask) -> dict[str, Any]:
    """Everything on which a cell's numbers depend."""
    configs = {}
    for method in plan.methods:
        config = method.configure(plan.recipe.adapter)
        configs[method.name] = {
            "library": method.library,
            "config": config and config.to_dict(),
            **method.mixer_training,
        }
    versions = collect_versions()
    identity: dict[str, Any] = {
        "recipe": plan.recipe.model_dump(exclude={"output", "parallel"}),
        "trainer": resolve_trainer_arguments(plan.recipe, task.device),
        "methods": configs,
        "learning_rates": list(plan.rates),
        "seeds": list(plan.seeds),
        "baseline": plan.baseline,
        "sizes": [len(task.train_set), len(task.validation_set), len(task.heldout_set)],
        "hashes": task.hashes(),
        "versions": {name: versions[name] for name in DECISIVE},
    }
    if not plan.recipe.evaluation.also:
        del identity["recipe"]["evaluation"]  # as comparisons had it that knew no such section
    elif task.also:
        identity["also"] = {also.name: also.sha256 for also in task.also}
    judge = BenchmarkJudge.of(plan)
    identity["benchmark"] = None if judge is None else judge.identity()
    identity["rates_from"] = dataclasses.asdict(plan.given) if plan.given.rates else None
    return json.loads(json.dumps(identity, default=_as_json))  # type: ignore[no-any-return]


def _without_nulls(value: Any) -> Any:
    """Drop keys that are null: a key that a later version added, and that nobody set, is the same as no key."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


@contextlib.contextmanager
def _claimed(plan: Comparison, task: LanguageTask, display: Display, command: str) -> Iterator[None]:
    """Make or reopen the folder, as the only process at work in it."""
    folder, record = plan.directory, plan.directory / "compare.json"
    identity = _identity(plan, task)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        # The lock is held, so whose these are is dead.
        for leftover in [
            path for place in (".", "cells", "confirm") for path in (folder / place).glob(".*.part")
        ]:
            remove(leftover)
        if not record.exists() and _holds_something(folder):
            raise UsageError(
                f"{folder} holds something that is not a comparison. Name another folder with --out."
            )
        if record.exists():
            try:
                old = json.loads(record.read_text(encoding="utf-8"))["identity"]
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"{record} is damaged; name another folder with --out.") from error
            changed = [
                name for name in identity if _without_nulls(old.get(name)) != _without_nulls(identity[name])
            ]
            if changed:
                raise UsageError(
                    f"{folder} holds a comparison with other {', '.join(changed)}. Continue with those, or name "
                    "another folder with --out. (Adding seeds or methods after seeing a result would make findings by "
                    "chance likelier than the intervals say.)"
                )
            done = sum(plan.cell_file(*cell).exists() for cell in plan.cells)
            display.say(f"Continuing {folder}: {done} of {len(plan.cells)} cells are finished.")
        else:
            about = {
                "schema_version": COMPARISON_SCHEMA_VERSION,
                "command": command,
                "hardware": collect_hardware(),
                "about": {method.name: method.about for method in plan.methods},
            }
            document = {**about, "versions": collect_versions(), "identity": identity}
            write_text(record, json.dumps(document, indent=2, ensure_ascii=False))
            display.say(f"Comparison: {folder}")
        (folder / "cells").mkdir(exist_ok=True)
        yield


def _holds_something(folder: Path) -> bool:
    """Say whether there is more than the empty folder of cells, which version 0.1 made before the record."""
    cells = folder / "cells"
    return any(path != cells or not path.is_dir() or any(path.iterdir()) for path in folder.iterdir())


# --- What came of it ----------------------------------------------------------------------------------------


def _judge(plan: Comparison) -> Verdict:
    """Judge the first stage. Where all rates were tuned elsewhere there is none, and the second's base is shown."""
    file = plan.base_file if plan.tuned else dataclasses.replace(plan, stage=2).base_file
    base: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"test": [0.0]}
    names = [method.name for method in plan.methods]
    verdict = judge(
        read_cells(plan),
        names,
        plan.baseline,
        base.get("validation", ()),
        base["test"],
        plan.pairs,
        plan.given.rates,
    )
    verdict = with_costs(verdict, read_cells(plan), base.get("also", {}))
    if plan.given.rates:
        verdict = dataclasses.replace(verdict, given=plan.given)
    asked = BenchmarkJudge.of(plan)
    if asked is not None:
        grade = fmean(base["correct"]) if "correct" in base else None
        verdict = dataclasses.replace(verdict, judged_by=asked.name, base_judged=grade)
    return verdict


def _say_second_stage(
    plan: Comparison, task: LanguageTask, wanted: Wanted | None, engine: Engine, display: Display
) -> None:
    """Say what a second stage would take, if the first is there to tell its rates."""
    if wanted is None:
        return
    if not all(plan.cell_file(*cell).exists() for cell in plan.cells) or (
        plan.cells and not plan.base_file.exists()
    ):
        goal = wanted.goal
        many = f"{goal.seeds}" if goal.width is None else f"up to {goal.seeds}"
        display.say(
            f"Then a second stage: each method at its best rate on {many} fresh seeds. How long it takes and what it "
            "can show is said when rates are chosen."
        )
        return
    verdict = _judge(plan)
    second = SecondStage.of(plan, verdict, display)
    own = task if plan.examples is None else prepare_task(second.plan, Display(quiet=True), lambda: None)
    if second.asked(plan.pairs):
        second.announce(wanted, verdict, len(own.heldout_set), engine.workers or 1)


def _write(plan: Comparison, verdict: Verdict, display: Display) -> None:
    """Write results and report."""
    write_text(
        plan.directory / "results.json",
        json.dumps(dataclasses.asdict(verdict), indent=2, ensure_ascii=False, allow_nan=False),
    )
    try:
        write_comparison_report(plan.directory, {m.name: m.about for m in plan.methods})
    except Exception as error:  # it shows a comparison and must not decide one
        display.warn(
            f"The report could not be written: {error} Try again with: moslora report {plan.directory}"
        )


def _conclude(plan: Comparison, verdict: Verdict, display: Display) -> Verdict:
    """Write results and report, and tell."""
    _write(plan, verdict, display)
    show_verdict(verdict, display)
    display.say(f"Results, for programs:        {plan.directory / 'results.json'}")
    display.say(f"Report, opens in a browser:   {plan.directory / 'report.html'}")
    return verdict
