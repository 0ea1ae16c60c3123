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

from moslora.comparison.results import Cell, Cost, Verdict
from moslora.comparison.verdict import LEVEL
from moslora.metrics.intervals import holm, paired_difference

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.tasks.also import AlsoSet
    from moslora.tasks.text.cost import Costs

__all__ = ["shares_of", "show_prices", "with_prices"]

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


def with_prices(verdict: Verdict, cells: Sequence[Cell], base: Mapping[str, Any]) -> Verdict:
    """Add what the methods cost to what they brought.

    Args:
        verdict: By the held-out data.
        cells: All of them.
        base: ``also`` of the untrained base; empty if nothing of the kind was measured.

    Returns:
        The verdict with prices, and with sentences that tell them.
    """
    if not base:
        return verdict
    rates = {result.name: result.best_rate for result in verdict.methods}
    chosen = {
        name: sorted((c for c in cells if c.method == name and c.learning_rate == rate), key=lambda c: c.seed)
        for name, rate in rates.items()
    }
    prices = [
        price
        for data in base
        for measure in MEASURES
        for price in _prices(data, measure, chosen, verdict.baseline)
    ]
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
    named = [contrast.method for contrast in verdict.contrasts if contrast.measure == "loss"]
    said = list(verdict.sentences)
    for index, method in enumerate(named):
        own = [
            _sentence(price, prices) for price in prices if price.method == method if price.measure == "loss"
        ]
        said[index] = " ".join([said[index], *own])
    return dataclasses.replace(
        verdict,
        sentences=said,
        prices=prices,
        base_also={data: fmean(of["loss"]) for data, of in base.items()},
        points_also=points,
    )


def _prices(
    data: str, measure: Literal["loss", "kl"], chosen: Mapping[str, Sequence[Cell]], baseline: str
) -> list[Cost]:
    def values(cell: Cell) -> Sequence[float]:
        return ((cell.also or {}).get(data) or {}).get(measure) or ()

    own = {name: [values(cell) for cell in of] for name, of in chosen.items() if of}
    others = [
        name
        for name, rows in own.items()
        if name != baseline
        if all(len(row) > 1 for row in (*rows, *own.get(baseline, ((),))))
    ]
    judged = {
        name: paired_difference(
            [
                [a - b for a, b in zip(one, two, strict=True)]
                for one, two in zip(own[name], own[baseline], strict=True)
            ],
            LEVEL,
        )
        for name in others
    }
    corrected = holm([judged[name].p for name in others])
    return [
        Cost(
            method=name,
            baseline=baseline,
            data=data,
            measure=measure,
            value=fmean(fmean(row) for row in own[name]),
            baseline_value=fmean(fmean(row) for row in own[baseline]),
            difference=judged[name],
            p_corrected=p,
            found="none" if p >= 1 - LEVEL else "more" if judged[name].mean > 0 else "less",
        )
        for name, p in zip(others, corrected, strict=True)
    ]


def _sentence(price: Cost, prices: Sequence[Cost]) -> str:
    found = price.difference
    numbers = (
        f"{found.mean:+.4f} (95 % interval {found.low:+.4f} to {found.high:+.4f}, corrected p = "
        f"{price.p_corrected:.2g})"
    )
    apart = next(
        (
            f"; KL from the base {p.value:.4f} against {p.baseline_value:.4f} nats a token"
            for p in prices
            if (p.method, p.data, p.measure) == (price.method, price.data, "kl")
        ),
        "",
    )
    what = f"loss on {price.data} text {numbers}{apart}."
    openings = {
        "more": f"The price, against {price.baseline}: ",
        "less": f"It costs less than {price.baseline}: ",
        "none": "No difference in price could be shown: ",
    }
    return openings[price.found] + what


def show_prices(verdict: Verdict, display: Display) -> None:
    """Show what each method cost, the mean of its seeds at its best rate.

    Args:
        verdict: Of a comparison; nothing is shown if nothing of the kind was measured.
        display: Where to.
    """
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
        title = f"What it cost on {data} text; without training the base has a loss of {base:.4f}"
        display.table(title, ["", "loss", "more than the base's", "KL from the base"], rows)
