"""What the methods of a comparison cost on data that tuning is not about, beside what they brought.

Each method's cells at its best rate are held against the baseline's, same seed and same passage, as their held-out
losses are. "Better" then reads as better by so much, at the price of so much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from moslora.comparison.confirmed import as_one_of_many
from moslora.comparison.results import Cell, Cost, Verdict
from moslora.comparison.verdict import LEVEL
from moslora.metrics.intervals import holm, paired_difference

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.tasks.also import AlsoSet
    from moslora.tasks.text.cost import Costs

__all__ = [
    "cost_of_pairs",
    "not_finite",
    "shares_of",
    "show_confirmed_costs",
    "show_costs",
    "with_cost_sentences",
    "with_costs",
]

MEASURES: tuple[Literal["loss", "kl"], ...] = ("loss", "kl")


def shares_of(sets: Sequence[AlsoSet], costs: Mapping[str, Costs], tuned: bool = True) -> dict[str, Any]:
    """Return what a cell keeps of its costs: the share of each passage in the mean over tokens.

    Args:
        sets: Of the task.
        costs: What was measured on them.
        tuned: Whether there is a tuned model; the base has its loss alone.

    Returns:
        By the set's name lists under ``loss`` and ``kl``; without sets on which a number is not finite.
    """
    from moslora.tasks.also import per_token

    found = {}
    for also in sets:
        of = costs[also.name]
        sums = {"loss": of.tuned, "kl": of.kl} if tuned else {"loss": of.base}
        shares = {name: per_token(values, of.tokens) for name, values in sums.items()}
        if all(map(math.isfinite, (value for values in shares.values() for value in values))):
            found[also.name] = shares
    return found


def with_costs(verdict: Verdict, cells: Sequence[Cell], base: Mapping[str, Any]) -> Verdict:
    """Add what the methods cost to what they brought.

    Args:
        verdict: By the held-out data.
        cells: All of them.
        base: ``also`` of the untrained base; empty if nothing of the kind was measured.

    Returns:
        The verdict with costs, and with sentences that tell them.
    """
    if not base:
        return verdict
    rates = {result.name: result.best_rate for result in verdict.methods}
    chosen = {
        name: [c for c in cells if c.method == name and c.learning_rate == rate]
        for name, rate in rates.items()
    }
    named = [(c.method, c.baseline) for c in verdict.contrasts if c.measure == "loss"]
    costs = cost_of_pairs([(pair, [chosen[name] for name in pair], LEVEL) for pair in named], base)
    points = [
        {
            "method": cell.method,
            "learning_rate": cell.learning_rate,
            "seed": cell.seed,
            "best": cell.learning_rate == rates.get(cell.method),
            "test": fmean(cell.test),
            "also": {
                data: {measure: fmean(values) for measure, values in of.items()}
                for data, of in cell.also.items()
            },
        }
        for cell in cells
        if cell.test is not None and cell.also
    ]
    return dataclasses.replace(
        verdict,
        sentences=[*with_cost_sentences(verdict.sentences, named, costs), *verdict.sentences[len(named) :]],
        cautions=[*verdict.cautions, *not_finite(chosen, base)],
        costs=costs,
        base_also={data: fmean(of["loss"]) for data, of in base.items()},
        points_also=points,
    )


def cost_of_pairs(
    pairs: Sequence[tuple[tuple[str, str], Sequence[Sequence[Cell]], float]], base: Mapping[str, Any]
) -> list[Cost]:
    """Compare what pairs of methods cost, same seed and same passage.

    Args:
        pairs: Method and baseline, the cells of each, and the level of the interval.
        base: ``also`` of the untrained base.

    Returns:
        By data, measure and pair; p-values are corrected for the number of pairs, and for their level.
    """
    found = []
    for data in base:
        for measure in MEASURES:
            judged = []
            for pair, cells, level in pairs:
                one, two = ({c.seed: v for c in of if (v := _values(c, data, measure))} for of in cells)
                seeds = sorted(one.keys() & two.keys())
                if len(seeds) > 1 and len(one[seeds[0]]) > 1:
                    rows = [[a - b for a, b in zip(one[s], two[s], strict=True)] for s in seeds]
                    means = [fmean(fmean(of[s]) for s in seeds) for of in (one, two)]
                    judged.append((pair, means, paired_difference(rows, level)))
            corrected = holm([as_one_of_many(difference) for _, _, difference in judged])
            for (pair, means, difference), p in zip(judged, corrected, strict=True):
                more = "more" if difference.mean > 0 else "less"
                found.append(
                    Cost(
                        method=pair[0],
                        baseline=pair[1],
                        data=data,
                        measure=measure,
                        value=means[0],
                        baseline_value=means[1],
                        difference=difference,
                        p_corrected=p,
                        found="none" if p >= 1 - LEVEL else more,  # type: ignore[arg-type]
                    )
                )
    return found


def _values(cell: Cell, data: str, measure: str) -> Sequence[float]:
    return ((cell.also or {}).get(data) or {}).get(measure) or ()


def not_finite(chosen: Mapping[str, Sequence[Cell]], base: Mapping[str, Any]) -> list[str]:
    """Say where a cost is of fewer seeds than were trained, because it was no finite number at the others.

    Args:
        chosen: The cells of each method at its best rate.
        base: ``also`` of the untrained base.
    """
    cautions = []
    for name, cells in chosen.items():
        done = [cell for cell in cells if cell.test is not None]
        for data in base:
            lost = sum(not _values(cell, data, "loss") for cell in done)
            if lost:
                rest = "of the others alone, and so too little" if lost < len(done) else "not known"
                cautions.append(
                    f"{name}: loss or KL on {data} text is missing or not finite at {lost} of {len(done)} seeds; what "
                    f"it cost is {rest}."
                )
    return cautions


def with_cost_sentences(
    sentences: Sequence[str], pairs: Sequence[tuple[str, str]], costs: Sequence[Cost]
) -> list[str]:
    """Return sentences on pairs of methods with what they cost.

    Args:
        sentences: What they brought, one per pair at least, in the order of the pairs.
        pairs: Methods and baselines.
        costs: From ``cost_of_pairs``.
    """
    told = []
    for sentence, pair in zip(sentences, pairs, strict=False):
        own = [_sentence(c, costs) for c in costs if (c.method, c.baseline) == pair and c.measure == "loss"]
        told.append(" ".join([sentence, *own]))
    return told


def _sentence(cost: Cost, costs: Sequence[Cost]) -> str:
    found = cost.difference
    numbers = (
        f"{found.mean:+.4f} ({100 * found.level:g} % interval {found.low:+.4f} to {found.high:+.4f}, corrected p = "
        f"{cost.p_corrected:.2g})"
    )
    apart = next(
        (
            f"; KL from the base {p.value:.4f} against {p.baseline_value:.4f} nats a token"
            for p in costs
            if (p.method, p.baseline, p.data, p.measure) == (cost.method, cost.baseline, cost.data, "kl")
        ),
        "",
    )
    what = f"loss on {cost.data} text {numbers}{apart}."
    openings = {
        "more": f"The price, against {cost.baseline}: ",
        "less": f"It costs less than {cost.baseline}: ",
        "none": "No difference in price could be shown: ",
    }
    return openings[cost.found] + what


def show_costs(verdict: Verdict, display: Display) -> None:
    """Show what each method cost, the mean of its seeds at its best rate.

    Args:
        verdict: Of a comparison; nothing is shown if nothing of the kind was measured.
        display: Where to.
    """
    stage = "" if verdict.confirmation is None else "First stage. "
    for data, base in (verdict.base_also or {}).items():
        rows = []
        for result in verdict.methods:
            best = [
                p["also"][data]
                for p in verdict.points_also
                if p["method"] == result.name and p["best"] and data in p["also"]
            ]
            if best:
                loss, kl = (fmean(point[measure] for point in best) for measure in MEASURES)
                rows.append([result.name, f"{loss:.4f}", f"{loss - base:+.4f}", f"{kl:.4f}"])
        title = f"{stage}What it cost on {data} text; without training the base has a loss of {base:.4f}"
        if rows:
            display.table(title, ["", "loss", "more than the base's", "KL from the base"], rows)


def show_confirmed_costs(costs: Sequence[Cost], display: Display) -> None:
    """Show what the methods of the second stage cost, a pair at a time.

    Args:
        costs: From ``cost_of_pairs``; nothing is shown if there are none.
        display: Where to.
    """
    rows = [
        [
            f"{c.method} less {c.baseline}, {'KL from the base' if c.measure == 'kl' else 'loss'} on {c.data} text",
            f"{c.value:.4f}",
            f"{c.baseline_value:.4f}",
            f"{c.difference.mean:+.4f} ({c.difference.low:+.4f} to {c.difference.high:+.4f})",
            f"{c.p_corrected:.2g}",
        ]
        for c in costs
    ]
    if rows:
        columns = ["", "method", "baseline", "difference", "corrected p"]
        display.table("What it cost, second stage", columns, rows)
