"""From the cells of the second stage to what they confirm: methods at their best rates, on seeds that chose nothing.

Differences are settled by ``moslora.metrics.sequential``: by the fresh seeds alone, in their order. A seed that one of
two methods lost pairs with nothing: it is counted, and a method is not called better in the seeds that it survived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from moslora.comparison.results import (
    Cell,
    Confirmation,
    ConfirmedContrast,
    ConfirmedMethod,
    Point,
)
from moslora.metrics.intervals import (
    Difference,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
)
from moslora.metrics.sequential import Goal, Look, Settled, half_width, level_of_look, needed_seeds, settle

__all__ = [
    "Asked",
    "Found",
    "confirm_methods",
    "rows_of",
    "settle_pair",
    "times",
    "why_not_reached",
]

LEVEL = 0.95
Pair = tuple[str, str]


@dataclass(frozen=True)
class Found:
    """The cells of the second stage, by method, rate and seed.

    Attributes:
        rates: The rate of each method that has one.
        seeds: The fresh seeds in order; more than are trained.
        cells: What is there.
        base: The untrained base's loss of each held-out example.
    """

    rates: Mapping[str, float]
    seeds: Sequence[int]
    cells: Mapping[tuple[str, float, int], Cell]
    base: Sequence[float]

    def of(self, method: str, factor: float = 1.0) -> list[Cell]:
        """Return a method's cells in the order of seeds, up to the first that is missing."""
        rate, there = times(self.rates[method], factor), []
        for seed in self.seeds:
            cell = self.cells.get((method, rate, seed))
            if cell is None:
                break
            there.append(cell)
        return there


@dataclass(frozen=True)
class Asked:
    """A contrast of the second stage.

    Attributes:
        pair: Method and baseline.
        looks: The verdicts given.
        late: Whether it was asked for after a result was there.
    """

    pair: Pair
    looks: Sequence[Look]
    late: bool = False


def times(rate: float, factor: float) -> float:
    """Return another rate, with digits that a file's name keeps."""
    return rate if factor == 1 else float(f"{rate * factor:.6g}")


def rows_of(
    one: Sequence[Cell], two: Sequence[Cell], measure: Literal["loss", "exact_match"] = "loss"
) -> list[list[float] | None]:
    """Return the differences of the examples for each seed that both have; None where one of them is lost.

    Args:
        one, two: Cells of two methods or rates, in the order of seeds.
        measure: Of which values.
    """

    def values(cell: Cell) -> Sequence[float] | None:
        return cell.test if measure == "loss" else cell.correct

    rows: list[list[float] | None] = []
    for a, b in zip(one, two, strict=False):
        left, right = values(a), values(b)
        whole = left is not None and right is not None
        rows.append([float(x) - float(y) for x, y in zip(left, right, strict=True)] if whole else None)  # type: ignore[arg-type]
    return rows


def settle_pair(found: Found, asked: Asked, goal: Goal) -> Settled:
    """Say whether a contrast has seeds enough, and if not how many it wants next.

    Args:
        found: What is there.
        asked: The contrast.
        goal: What is to be reached.
    """
    method, baseline = asked.pair
    return settle(rows_of(found.of(method), found.of(baseline)), goal, asked.looks)


def confirm_methods(
    found: Found, asked: Sequence[Asked], goal: Goal, judged_by: str, priced_seeds: int = 0
) -> Confirmation:
    """Judge the second stage, without its prices.

    Args:
        found: The cells.
        asked: Contrasts on which a verdict was given, each with its looks.
        goal: What was asked for last.
        judged_by: What grades of questions are called.
        priced_seeds: On how many seeds prices were judged.

    Returns:
        What is confirmed; its sentences are those of the contrasts.
    """
    # Seeds beyond are of a verdict that is not given yet.
    judged = dict.fromkeys(found.rates, priced_seeds)
    for one in asked:
        for name in one.pair:
            judged[name] = max(judged[name], one.looks[-1].seeds)
    methods = [_method(name, rate, found.of(name)[: judged[name]]) for name, rate in found.rates.items()]
    contrasts = []
    for measure in ("loss", "exact_match"):
        contrasts += _contrasts(found, asked, measure, goal)
    there = {(one.method, one.baseline) for one in contrasts}
    missing = [
        f"Nothing is confirmed of {one.pair[0]} and {one.pair[1]}: fewer than two of {one.looks[-1].seeds} fresh seeds "
        "finished with both."
        for one in asked
        if one.pair not in there
    ]
    longest = max((len(method.points) for method in methods), default=0)
    return Confirmation(
        goal=goal,
        seeds=list(found.seeds[:longest]),
        examples=len(found.base),
        base_loss=fmean(found.base),
        methods=methods,
        contrasts=contrasts,
        prices=[],
        sentences=[*(_sentence(c, found, judged_by) for c in contrasts), *missing],
        cautions=_cautions(methods, contrasts, goal, fmean(found.base)),
        complete=not missing,
    )


def _method(name: str, rate: float, cells: Sequence[Cell]) -> ConfirmedMethod:
    scores = [fmean(cell.test) for cell in cells if cell.test is not None]
    answers = [fmean(cell.correct) for cell in cells if cell.correct]
    done = [cell.seconds for cell in cells if cell.status == "done"]
    return ConfirmedMethod(
        name=name,
        rate=rate,
        points=[point_of(cell) for cell in cells],
        score=fmean(scores) if scores else None,
        interval=mean_interval(scores, LEVEL) if len(scores) > 1 else None,
        exact_match=fmean(answers) if answers else None,
        diverged=sum(cell.status == "diverged" for cell in cells),
        crashed=sum(cell.status == "crashed" for cell in cells),
        seconds=median(done) if done else None,
    )


def point_of(cell: Cell) -> Point:
    """Return what is shown of a cell."""
    test = None if cell.test is None else fmean(cell.test)
    return Point(cell.learning_rate, cell.seed, cell.status, cell.reason, None, test)


def _contrasts(
    found: Found, asked: Sequence[Asked], measure: Literal["loss", "exact_match"], goal: Goal
) -> list[ConfirmedContrast]:
    """Judge every contrast that has a verdict, and correct for their number."""
    judged: list[tuple[Asked, Difference, list[float], tuple[int, int]]] = []
    for one in asked:
        look = one.looks[-1]
        cells = [found.of(name)[: look.seeds] for name in one.pair]
        rows = [row for row in rows_of(cells[0], cells[1], measure) if row]
        if measure == "loss":
            difference = settle_pair(found, one, Goal(look.seeds)).difference
        else:
            level = level_of(one)
            difference = (
                paired_difference(rows, level) if min(len(rows), *map(len, rows or [[]])) > 1 else None
            )
        if difference is not None:
            lost = (sum(c.status != "done" for c in cells[0]), sum(c.status != "done" for c in cells[1]))
            judged.append((one, difference, [fmean(row) for row in rows], lost))
    corrected = holm([as_one_of_many(difference) for _, difference, _, _ in judged])
    return [_contrast(measure, *one, p, len(judged), goal) for one, p in zip(judged, corrected, strict=True)]


def level_of(one: Asked) -> float:
    """Return the level of a contrast's last verdict."""
    return level_of_look(len(one.looks), LEVEL)


def as_one_of_many(difference: Difference) -> float:
    """Return a p-value to be compared with 5 %, of a verdict that has only a part of these."""
    return min(1.0, difference.p * (1 - LEVEL) / (1 - difference.level))


def _contrast(
    measure: Literal["loss", "exact_match"],
    one: Asked,
    difference: Difference,
    by_seed: Sequence[float],
    lost: tuple[int, int],
    p: float,
    many: int,
    goal: Goal,
) -> ConfirmedContrast:
    is_better = (difference.mean < 0) == (measure == "loss")
    shown: Literal["better", "worse", "none"] = "better" if is_better else "worse"
    # Who looks better must not have lost more: what would have been bad is missing among its seeds.
    if p >= 1 - LEVEL or (lost[0] > lost[1] if is_better else lost[1] > lost[0]):
        shown = "none"
    width = half_width(difference)
    waited = goal.width if measure == "loss" else None
    return ConfirmedContrast(
        method=one.pair[0],
        baseline=one.pair[1],
        measure=measure,
        difference=difference,
        p_corrected=p,
        detectable=detectable_difference(
            difference.seed_deviation,
            difference.example_deviation,
            difference.seeds,
            difference.examples,
            difference.level,
            many,
        ),
        found=shown,
        by_seed=by_seed,
        lost=lost,
        looks=one.looks,
        half_width=width,
        reached=None if waited is None else width <= waited * (1 + 1e-9),
        limit="examples" if difference.half_of_examples > difference.half_of_seeds else "seeds",
        late=one.late,
    )


# --- In words -----------------------------------------------------------------------------------------------


def _sentence(contrast: ConfirmedContrast, found: Found, judged_by: str) -> str:
    difference, name, against = contrast.difference, contrast.method, contrast.baseline
    measured = "held-out loss" if contrast.measure == "loss" else judged_by
    rates = f"at the rates chosen before ({found.rates[name]:g} and {found.rates[against]:g})"
    numbers = (
        f"{measured} {difference.mean:+.4f} (interval {difference.low:+.4f} to {difference.high:+.4f}, corrected p = "
        f"{contrast.p_corrected:.2g}; {difference.seeds} fresh seeds, {difference.examples} examples)"
    )
    lost = [
        f"{who} did not finish at {count} of {contrast.looks[-1].seeds} seeds"
        for who, count in zip((name, against), contrast.lost, strict=True)
        if count
    ]
    losses = f" {' and '.join(lost)}: the difference is of the others alone." if lost else ""
    if contrast.found == "none" and contrast.p_corrected < 1 - LEVEL:
        ahead, behind = (name, against) if contrast.lost[0] > contrast.lost[1] else (against, name)
        return (
            f"Confirmed: {ahead} was ahead of {behind} in the seeds that both finished, {rates}: {numbers}. But it "
            f"lost more seeds, so it is not called better.{losses}"
        )
    if contrast.found == "none":
        return (
            f"Confirmed: no difference between {name} and {against} could be shown, {rates}: {numbers}. One of "
            f"{contrast.detectable:.2g} would have been seen four times out of five.{losses}"
        )
    return f"Confirmed: {name} is {contrast.found} than {against}, {rates}: {numbers}.{losses}"


def _cautions(
    methods: Sequence[ConfirmedMethod],
    contrasts: Sequence[ConfirmedContrast],
    goal: Goal,
    base_loss: float,
) -> list[str]:
    cautions = []
    for contrast in contrasts:
        name, difference = f"{contrast.method} less {contrast.baseline}", contrast.difference
        if contrast.reached is False and goal.width is not None:
            cautions.append(f"{name}: {why_not_reached(difference, goal.width)}")
        elif goal.width is None and contrast.measure == "loss" and contrast.limit == "examples":
            cautions.append(
                f"{name}: the {difference.examples} held-out examples, not the seeds, make the interval wide: of its "
                f"±{contrast.half_width:.2g} no number of seeds would leave less than ±{difference.half_at_best:.2g}."
            )
        if len(contrast.looks) > 1 and contrast.measure == "loss":
            earlier = ", ".join(str(look.seeds) for look in contrast.looks[:-1])
            cautions.append(
                f"{name}: verdict {len(contrast.looks)}, after one on {earlier} seeds. It is given at "
                f"{contrast.difference.level:.2%}, so that all of them together hold at {LEVEL:.0%}."
            )
        if contrast.late and contrast.measure == "loss":
            cautions.append(
                f"{name} was asked for after a result of this stage was there; p-values count it as if it had been "
                "asked for at first, which is too little if the result suggested it."
            )
    cautions += [
        f"{method.name}: {method.diverged} of {len(method.points)} fresh seeds diverged and {method.crashed} crashed."
        for method in methods
        if method.diverged or method.crashed
    ]
    cautions += [
        f"{method.name} did not improve on the untrained base ({method.score:.4f} against {base_loss:.4f})."
        for method in methods
        if method.score is not None and method.score >= base_loss
    ]
    return cautions


def why_not_reached(difference: Difference, width: float) -> str:
    """Say what keeps an interval wider than asked: too few seeds, or the examples.

    Args:
        difference: As it is.
        width: The half-width asked for.
    """
    now, best = half_width(difference), difference.half_at_best
    if best >= width:
        examples = round(difference.examples * (best / width) ** 2 * 1.05) + 1
        return (
            f"the interval is ±{now:.2g}, not ±{width:.2g}, and no number of seeds would do: the {difference.examples} "
            f"held-out examples alone keep it at ±{best:.2g}. More than {examples} such examples are needed."
        )
    return (
        f"the interval is ±{now:.2g}, not yet ±{width:.2g}, for which about {needed_seeds(difference, width):.0f} "
        "seeds are needed (--confirm)."
    )
