"""From the cells of a comparison to a verdict: learning rates chosen, differences judged, and a plain sentence.

A cell is one training: a method, a learning rate and a seed. The learning rate is chosen by the validation loss, the
methods are compared by the held-out loss; no example serves both. What diverged or crashed is shown and never averaged
away: a rate counts only if every seed finished at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Literal

from moslora.comparison.results import Cell, Contrast, MethodResult, Point, Verdict
from moslora.errors import UsageError
from moslora.metrics.intervals import (
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
)

__all__ = ["Cell", "Contrast", "MethodResult", "Verdict", "foresee", "judge"]

LEVEL = 0.95
# A rate belongs to the stable range if it keeps this much of the best rate's improvement over the base.
LEAST_IMPROVEMENT = 0.9


def judge(
    cells: Sequence[Cell],
    methods: Sequence[str],
    baseline: str,
    base_validation: Sequence[float],
    base_test: Sequence[float],
    pairs: Sequence[tuple[str, str]] | None = None,
    given: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge a comparison.

    Args:
        cells: All of them, one for every method that is tuned, rate and seed.
        methods: Names, the baseline among them.
        baseline: What the others are compared with.
        base_validation, base_test: The untrained base's loss of each example.
        pairs: Which method is compared with which; None for each with the baseline.
        given: Rates of methods that are not tuned here.

    Returns:
        The verdict.

    Raises:
        ValueError: If a cell is missing or there twice.
    """
    given = given or {}
    _check(cells, [name for name in methods if name not in given], baseline, methods)
    pairs = [(name, baseline) for name in methods if name != baseline] if pairs is None else pairs
    chosen: dict[str, list[Cell]] = {}
    results = []
    for name in methods:
        own = [cell for cell in cells if cell.method == name]
        rate = given[name] if name in given else _best_rate(own)
        chosen[name] = sorted((c for c in own if c.learning_rate == rate), key=lambda c: c.seed)
        results.append(_result(name, own, rate, chosen[name], base_validation))
    contrasts = []
    for measure in ("loss", "exact_match"):
        contrasts += _contrasts(pairs, chosen, measure)
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


def _check(cells: Sequence[Cell], methods: Sequence[str], baseline: str, compared: Sequence[str]) -> None:
    if baseline not in compared:
        raise UsageError(f"The baseline {baseline!r} is none of the methods {', '.join(compared)}.")
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
    name: str, cells: Sequence[Cell], rate: float | None, chosen: Sequence[Cell], base: Sequence[float]
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
        stable=_stable(cells, rate, fmean(base)) if cells else None,
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
    asked: Sequence[tuple[str, str]],
    chosen: Mapping[str, Sequence[Cell]],
    measure: Literal["loss", "exact_match"],
) -> list[Contrast]:
    """Compare every pair of which both have results, and correct for their number."""

    def scores(cell: Cell) -> Sequence[float]:
        values = cell.test if measure == "loss" else cell.correct
        return [float(value) for value in values or ()]

    whole = [
        (name, baseline)
        for name, baseline in asked
        if chosen[name] and chosen[baseline]
        if all(len(scores(c)) > 1 for c in (*chosen[name], *chosen[baseline]))
    ]
    differences = {}
    for name, baseline in whole:
        pairs = list(zip(chosen[name], chosen[baseline], strict=True))
        if any(one.seed != two.seed for one, two in pairs):
            raise UsageError(f"The seeds of {name} and {baseline} do not pair.")
        differences[name, baseline] = [
            [a - b for a, b in zip(scores(one), scores(two), strict=True)] for one, two in pairs
        ]
    judged = {pair: paired_difference(rows, LEVEL) for pair, rows in differences.items()}
    corrected = holm([judged[pair].p for pair in whole])
    contrasts = []
    for (name, baseline), p in zip(whole, corrected, strict=True):
        found = judged[name, baseline]
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
                    len(whole),
                ),
                found=shown if p < 1 - LEVEL else "none",
                by_seed=[fmean(row) for row in differences[name, baseline]],
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
        comparisons: How many pairs it compares.

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
