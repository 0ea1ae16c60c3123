"""From the cells of a comparison to a verdict: learning rates chosen, differences judged, and a plain sentence.

A cell is one training: a method, a learning rate and a seed. The learning rate is chosen by the validation loss, the
methods are compared by the held-out loss; no example serves both. What diverged or crashed is shown and never averaged
away: a rate counts only if every seed finished at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import Any, Literal

from moslora.comparison.price import Price
from moslora.errors import UsageError
from moslora.metrics.intervals import (
    Difference,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
)

__all__ = ["Cell", "Contrast", "MethodResult", "Verdict", "foresee", "judge"]

LEVEL = 0.95
# A rate belongs to the stable range if it keeps this much of the best rate's improvement over the base.
LEAST_IMPROVEMENT = 0.9

Status = Literal["done", "diverged", "crashed"]


@dataclass(frozen=True)
class Cell:
    """One training and what came of it.

    Attributes:
        method: Its name.
        learning_rate: Peak rate of the schedule.
        seed: Of initial values and data order.
        status: ``"done"``, ``"diverged"`` (a value was NaN or infinite) or ``"crashed"``.
        reason: Why it is not done, in words.
        validation: Loss of each validation example, in nats per trained token; None unless done.
        test: The same of each held-out example.
        correct: Whether each answered held-out example was right, or a grade of each unit of a benchmark; None without.
        train_loss: Mean training loss of the last logged steps; None if there is none.
        seconds: Wall-clock time of the training alone.
        cpu_seconds: Processor time of it.
        cell_seconds: Wall-clock time with evaluation, from which the rest is estimated.
        peak_bytes: Peak of memory while training: of the GPU, or of the whole process on a CPU; None if not known.
        trainable_parameters: How many.
        together: How many cells were trained at once over one base; times are the whole's divided by it, and the peak
            of memory is the whole's.
        also: By data that tuning is not about: ``loss``, and ``kl`` from the base, of each passage, as its share in the
            mean over tokens; None where that was not measured.
    """

    method: str
    learning_rate: float
    seed: int
    status: Status
    reason: str | None = None
    validation: Sequence[float] | None = None
    test: Sequence[float] | None = None
    correct: Sequence[float] | None = None
    train_loss: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    cell_seconds: float = 0.0
    peak_bytes: int | None = None
    trainable_parameters: int | None = None
    together: int = 1
    also: Mapping[str, Mapping[str, Sequence[float]]] | None = None


@dataclass(frozen=True)
class Point:
    """One seed at one rate, as shown.

    Attributes:
        learning_rate, seed, status, reason: Of the cell.
        validation, test: Mean losses; None unless done.
    """

    learning_rate: float
    seed: int
    status: Status
    reason: str | None
    validation: float | None
    test: float | None


@dataclass(frozen=True)
class MethodResult:
    """A method at its best learning rate.

    Attributes:
        name: Of the method.
        points: Every cell, whatever came of it.
        best_rate: With the lowest mean validation loss among rates at which every seed finished; None if there is none.
        at_edge: Whether that is the lowest or the highest rate tried, so that a better one may lie outside.
        stable: Lowest and highest rate around the best one that keep 90 % of its improvement over the base.
        score: Mean held-out loss over seeds and examples, at the best rate.
        interval: Its 95 % interval over seeds, for these examples.
        exact_match: Mean share of right answers there; None without a metric.
        diverged, crashed: How many cells.
        trainable_parameters: How many.
        seconds, cpu_seconds: Medians of the training time of a cell.
        peak_bytes: Largest peak of memory over the method's cells.
    """

    name: str
    points: Sequence[Point]
    best_rate: float | None
    at_edge: Literal["lowest", "highest"] | None
    stable: tuple[float, float] | None
    score: float | None
    interval: tuple[float, float] | None
    exact_match: float | None
    diverged: int
    crashed: int
    trainable_parameters: int | None
    seconds: float | None
    cpu_seconds: float | None
    peak_bytes: int | None


@dataclass(frozen=True)
class Contrast:
    """A method against the baseline, each at its best rate.

    Attributes:
        method, baseline: Their names.
        measure: ``"loss"`` (lower is better) or ``"exact_match"`` (higher is better).
        difference: Method less baseline, same seeds and same examples.
        p_corrected: Holm's, over all methods compared by this measure.
        detectable: The smallest true difference that this much data would have shown four times out of five.
        found: ``"better"``, ``"worse"``, or ``"none"`` if no difference could be shown.
        by_seed: The mean difference of each seed.
    """

    method: str
    baseline: str
    measure: Literal["loss", "exact_match"]
    difference: Difference
    p_corrected: float
    detectable: float
    found: Literal["better", "worse", "none"]
    by_seed: Sequence[float]


@dataclass(frozen=True)
class Verdict:
    """The outcome of a comparison.

    Attributes:
        baseline: The method that the others are compared with.
        base_loss: Mean held-out loss of the untrained base.
        methods: In the order asked for, the baseline among them.
        contrasts: By loss first, then by exact match.
        sentences: What was found, in plain words, one per method compared.
        cautions: What a reader has to know beside them.
        complete: Whether every method has a result.
        judged_by: What ``exact_match`` stands for: exact match, or a benchmark's name.
        base_judged: The untrained base's share of it; None where it was not measured.
        prices: What methods cost on other data; empty where that was not measured.
        base_also: The untrained base's loss there, by the name of the data.
        points_also: Every finished cell's held-out loss beside its costs.
    """

    baseline: str
    base_loss: float
    methods: Sequence[MethodResult]
    contrasts: Sequence[Contrast]
    sentences: Sequence[str]
    cautions: Sequence[str]
    complete: bool
    judged_by: str = "exact match"
    base_judged: float | None = None
    prices: Sequence[Price] = ()
    base_also: Mapping[str, float] | None = None
    points_also: Sequence[Mapping[str, Any]] = ()


def judge(
    cells: Sequence[Cell],
    methods: Sequence[str],
    baseline: str,
    base_validation: Sequence[float],
    base_test: Sequence[float],
) -> Verdict:
    """Judge a comparison.

    Args:
        cells: All of them, one for every method, rate and seed.
        methods: Names, the baseline among them.
        baseline: What the others are compared with.
        base_validation, base_test: The untrained base's loss of each example.

    Returns:
        The verdict.

    Raises:
        ValueError: If a cell is missing or there twice.
    """
    _check(cells, methods, baseline)
    chosen: dict[str, list[Cell]] = {}
    results = []
    for name in methods:
        own = [cell for cell in cells if cell.method == name]
        rate = _best_rate(own)
        chosen[name] = sorted((c for c in own if c.learning_rate == rate), key=lambda c: c.seed)
        results.append(_result(name, own, rate, chosen[name], fmean(base_validation)))
    contrasts = []
    for measure in ("loss", "exact_match"):
        contrasts += _contrasts(methods, baseline, chosen, measure)
    sentences = [_sentence(c, chosen) for c in contrasts if c.measure == "loss"]
    sentences += [_missing(result, baseline) for result in results if result.best_rate is None]
    return Verdict(
        baseline=baseline,
        base_loss=fmean(base_test),
        methods=results,
        contrasts=contrasts,
        sentences=sentences,
        cautions=[*_cautions(results, contrasts, fmean(base_test)), *_of_costs(cells)],
        complete=all(result.best_rate is not None for result in results),
    )


def _check(cells: Sequence[Cell], methods: Sequence[str], baseline: str) -> None:
    if baseline not in methods:
        raise UsageError(f"The baseline {baseline!r} is none of the methods {', '.join(methods)}.")
    there = [(c.method, c.learning_rate, c.seed) for c in cells]
    rates, seeds = {c.learning_rate for c in cells}, {c.seed for c in cells}
    wanted = {(m, r, s) for m in methods for r in rates for s in seeds}
    if len(set(there)) != len(there) or set(there) != wanted:
        odd = sorted(wanted.symmetric_difference(there)) or "one is there twice"
        raise UsageError(f"The cells are not one for every method, rate and seed: {odd}.")


def _best_rate(cells: Sequence[Cell]) -> float | None:
    """Choose the rate with the lowest mean validation loss, of those at which every seed finished."""
    losses = _curve(cells)
    return min(losses, key=lambda rate: losses[rate]) if losses else None


def _curve(cells: Sequence[Cell]) -> dict[float, float]:
    """Mean validation loss by rate, in order of rates, where every seed finished."""
    curve: dict[float, float] = {}
    for rate in sorted({cell.learning_rate for cell in cells}):
        losses = [cell.validation for cell in cells if cell.learning_rate == rate]
        whole = [fmean(loss) for loss in losses if loss is not None]
        if len(whole) == len(losses):
            curve[rate] = fmean(whole)
    return curve


def _result(
    name: str, cells: Sequence[Cell], rate: float | None, chosen: Sequence[Cell], base: float
) -> MethodResult:
    def known(values: Sequence[float | int | None]) -> list[float]:
        return [value for value in values if value is not None]

    points = [
        Point(
            cell.learning_rate,
            cell.seed,
            cell.status,
            cell.reason,
            None if cell.validation is None else fmean(cell.validation),
            None if cell.test is None else fmean(cell.test),
        )
        for cell in sorted(cells, key=lambda c: (c.learning_rate, c.seed))
    ]
    scores = [fmean(cell.test) for cell in chosen if cell.test is not None]
    answers = [fmean(cell.correct) for cell in chosen if cell.correct]
    done = [cell for cell in cells if cell.status == "done"]
    rates = sorted({cell.learning_rate for cell in cells})
    peaks = known([cell.peak_bytes for cell in done])
    parameters = known([cell.trainable_parameters for cell in cells])
    edge: Literal["lowest", "highest"] | None = None
    if rate is not None and len(rates) > 1 and rate in (rates[0], rates[-1]):
        edge = "lowest" if rate == rates[0] else "highest"
    return MethodResult(
        name=name,
        points=points,
        best_rate=rate,
        at_edge=edge,
        stable=_stable(cells, rate, base),
        score=fmean(scores) if scores else None,
        interval=mean_interval(scores, LEVEL) if len(scores) > 1 else None,
        exact_match=fmean(answers) if answers else None,
        diverged=sum(cell.status == "diverged" for cell in cells),
        crashed=sum(cell.status == "crashed" for cell in cells),
        trainable_parameters=int(parameters[0]) if parameters else None,
        seconds=median(cell.seconds for cell in done) if done else None,
        cpu_seconds=median(cell.cpu_seconds for cell in done) if done else None,
        peak_bytes=int(max(peaks)) if peaks else None,
    )


def _stable(cells: Sequence[Cell], best: float | None, base: float) -> tuple[float, float] | None:
    """Find the unbroken range of tried rates around the best that keeps most of its improvement."""
    curve = _curve(cells)
    if best is None or curve[best] >= base:
        return None  # nothing was improved, so there is nothing to keep
    allowed = base - LEAST_IMPROVEMENT * (base - curve[best])
    rates = sorted({cell.learning_rate for cell in cells})
    low = high = rates.index(best)
    while low > 0 and curve.get(rates[low - 1], float("inf")) <= allowed:
        low -= 1
    while high < len(rates) - 1 and curve.get(rates[high + 1], float("inf")) <= allowed:
        high += 1
    return rates[low], rates[high]


def _contrasts(
    methods: Sequence[str],
    baseline: str,
    chosen: Mapping[str, Sequence[Cell]],
    measure: Literal["loss", "exact_match"],
) -> list[Contrast]:
    """Compare every method that has a result with the baseline, and correct for their number."""

    def scores(cell: Cell) -> Sequence[float]:
        values = cell.test if measure == "loss" else cell.correct
        return [float(value) for value in values or ()]

    others = [
        name
        for name in methods
        if name != baseline and all(len(scores(c)) > 1 for c in (*chosen[name], *chosen[baseline]))
        if chosen[name] and chosen[baseline]
    ]
    differences = {}
    for name in others:
        pairs = list(zip(chosen[name], chosen[baseline], strict=True))
        if any(one.seed != two.seed for one, two in pairs):
            raise UsageError(f"The seeds of {name} and {baseline} do not pair.")
        differences[name] = [
            [a - b for a, b in zip(scores(one), scores(two), strict=True)] for one, two in pairs
        ]
    judged = {name: paired_difference(rows, LEVEL) for name, rows in differences.items()}
    corrected = holm([judged[name].p for name in others])
    contrasts = []
    for name, p in zip(others, corrected, strict=True):
        found = judged[name]
        better = found.mean < 0 if measure == "loss" else found.mean > 0
        shown: Literal["better", "worse", "none"] = "better" if better else "worse"
        contrasts.append(
            Contrast(
                method=name,
                baseline=baseline,
                measure=measure,
                difference=found,
                p_corrected=p,
                detectable=detectable_difference(
                    found.seed_deviation,
                    found.example_deviation,
                    found.seeds,
                    found.examples,
                    LEVEL,
                    len(others),
                ),
                found=shown if p < 1 - LEVEL else "none",
                by_seed=[fmean(row) for row in differences[name]],
            )
        )
    return contrasts


def foresee(cells: Sequence[Cell], seeds: int, comparisons: int) -> float | None:
    """Say beforehand what difference a comparison could detect, from a few seeds of one method at one rate.

    Seeds of one method differ as much as seeds of two that are alike, so pairs of them stand in for pairs of methods.
    Where the same seed makes two methods err alike, the comparison will see smaller differences than this.

    Args:
        cells: Of one method and one rate, different seeds.
        seeds: How many the comparison has.
        comparisons: How many methods it compares with the baseline.

    Returns:
        In nats per token; None with fewer than two finished cells.
    """
    tests = [cell.test for cell in cells if cell.test is not None]
    if len(tests) < 2 or seeds < 2:
        return None
    between = 2**0.5 * stdev([fmean(test) for test in tests])
    spreads = [
        stdev([a - b for a, b in zip(one, two, strict=True)])
        for index, one in enumerate(tests)
        for two in tests[index + 1 :]
    ]
    # Averaged over seeds, what a seed does to single examples counts less; taking it in full errs on the safe side.
    return detectable_difference(between, fmean(spreads), seeds, len(tests[0]), LEVEL, comparisons)


# --- In words -----------------------------------------------------------------------------------------------


def _sentence(contrast: Contrast, chosen: Mapping[str, Sequence[Cell]]) -> str:
    found, name, against = contrast.difference, contrast.method, contrast.baseline
    rates = (
        f"each at its best rate ({chosen[name][0].learning_rate:g} and {chosen[against][0].learning_rate:g})"
    )
    numbers = (
        f"{found.mean:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f}, corrected p = "
        f"{contrast.p_corrected:.2g}; {found.seeds} seeds, {found.examples} examples)"
    )
    if contrast.found == "none":
        if found.p < 1 - LEVEL:
            numbers += "; the interval leaves out zero, but among so many methods one does by chance"
        return (
            f"No difference between {name} and {against} could be shown, {rates}: held-out loss {numbers}. With this "
            f"much data you could have seen one of {contrast.detectable:.2g}, four times out of five."
        )
    return f"{name} is {contrast.found} than {against}, {rates}: held-out loss {numbers}."


def _missing(result: MethodResult, baseline: str) -> str:
    counts = [f"{n} {what}" for n, what in ((result.diverged, "diverged"), (result.crashed, "crashed")) if n]
    rest = " Without it nothing can be compared." if result.name == baseline else ""
    reason = next((point.reason for point in result.points if point.reason), "")
    return (
        f"{result.name} has no result: at no learning rate did every seed finish "
        f"({' and '.join(counts)} of {len(result.points)} cells; the first: {reason}).{rest}"
    )


def _of_costs(cells: Sequence[Cell]) -> list[str]:
    """Say what times and memory stand for where cells were trained at once."""
    sizes = {cell.together for cell in cells if cell.status == "done"}
    if sizes <= {1}:
        return []
    many = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{max(sizes)}"
    text = f"Cells were trained {many} at a time: times are divided among them, peaks of memory are of all together."
    by_method = {name: {c.together for c in cells if c.method == name} for name in {c.method for c in cells}}
    if len({tuple(sorted(found)) for found in by_method.values()}) > 1:
        text += " Methods differ in it, so their times and peaks cannot be compared."
    return [text]


def _cautions(results: Sequence[MethodResult], contrasts: Sequence[Contrast], base_loss: float) -> list[str]:
    cautions = []
    for result in results:
        if result.at_edge and len({p.learning_rate for p in result.points}) > 1:
            cautions.append(
                f"{result.name} was best at the {result.at_edge} rate tried, {result.best_rate:g}; a better one may "
                "lie beyond. Try more rates before believing a difference."
            )
        if result.best_rate is not None and (result.diverged or result.crashed):
            cautions.append(
                f"{result.name}: {result.diverged} cells diverged and {result.crashed} crashed, of "
                f"{len(result.points)}; their rates were not chosen."
            )
        if result.score is not None and result.score >= base_loss:
            cautions.append(
                f"{result.name} did not improve on the untrained base ({result.score:.4f} against {base_loss:.4f})."
            )
    if len({p.learning_rate for result in results for p in result.points}) == 1:
        cautions.append("Only one learning rate was tried, so none is tuned: a difference may be the rate's.")
    if any(c.difference.seeds == 2 for c in contrasts):
        cautions.append(
            "Two seeds say little about seeds: intervals are wide. Three or more narrow them much."
        )
    return cautions
