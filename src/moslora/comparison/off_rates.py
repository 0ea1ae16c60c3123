"""What a wrong learning rate costs: the loss beside each method's best rate, paired by seed, and the share lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from moslora.comparison.confirmed import LEVEL, Found, as_one_of_many, rows_of, times
from moslora.comparison.results import Price
from moslora.metrics.answers import wilson_interval
from moslora.metrics.intervals import Difference, holm, paired_difference
from moslora.metrics.sequential import level_of_look

__all__ = ["price_rates", "say_prices"]


def price_rates(found: Found, baseline: str, factors: Sequence[float], seeds: int, looks: int) -> list[Price]:
    """Compare each method at other rates with itself at its best one, and its price with the baseline's.

    Args:
        found: The cells of the second stage.
        baseline: Whose price the others' are compared with.
        factors: The rates, as multiples of the best one.
        seeds: How many of the fresh seeds, all trained at all of these rates.
        looks: How often this was judged, with this time.

    Returns:
        One per method and factor.
    """
    level = level_of_look(looks, LEVEL)
    prices, own = [], {}
    for factor in factors:
        for name, rate in found.rates.items():
            away, best = found.of(name, factor)[:seeds], found.of(name)[:seeds]
            own[name, factor] = rows_of(away, best)
            lost = sum(cell.status != "done" for cell in away)
            scores = [fmean(cell.test) for cell in away if cell.test is not None]
            prices.append(
                Price(
                    method=name,
                    factor=factor,
                    rate=times(rate, factor),
                    seeds=len(away),
                    diverged=sum(cell.status == "diverged" for cell in away),
                    crashed=sum(cell.status == "crashed" for cell in away),
                    lost_interval=wilson_interval(lost, len(away)),
                    worse_than_base=sum(score > fmean(found.base) for score in scores),
                    score=fmean(scores) if scores else None,
                    difference=_difference(own[name, factor], level),
                    p_corrected=None,
                    beside_baseline=None,
                    p_beside_corrected=None,
                )
            )
    for index, price in enumerate(prices):
        theirs = own.get((baseline, price.factor))
        if price.method != baseline and theirs is not None:
            pairs = zip(own[price.method, price.factor], theirs, strict=False)
            rows = [
                None if a is None or b is None else [x - y for x, y in zip(a, b, strict=True)]
                for a, b in pairs
            ]
            prices[index] = replace(price, beside_baseline=_difference(rows, level))
    of_none = _corrected([price.difference for price in prices])
    beside = _corrected([price.beside_baseline for price in prices])
    return [
        replace(price, p_corrected=p, p_beside_corrected=q)
        for price, p, q in zip(prices, of_none, beside, strict=True)
    ]


def _difference(rows: Sequence[Sequence[float] | None], level: float) -> Difference | None:
    whole = [row for row in rows if row is not None]
    return paired_difference(whole, level) if len(whole) > 1 else None


def _corrected(differences: Sequence[Difference | None]) -> list[float | None]:
    known = iter(holm([as_one_of_many(one) for one in differences if one is not None]))
    return [None if one is None else next(known) for one in differences]


def say_prices(prices: Sequence[Price], baseline: str) -> list[str]:
    """Say in words which prices differ from the baseline's, and who lost seeds.

    Args:
        prices: Of all methods and factors.
        baseline: The method that the others are compared with.
    """
    sentences = []
    gone_of = {(price.method, price.factor): price.diverged + price.crashed for price in prices}
    for price in prices:
        where = f"At {price.factor:g} times its best rate ({price.rate:g})"
        gone = price.diverged + price.crashed
        if gone:
            low, high = price.lost_interval
            sentences.append(
                f"{where} {price.method} did not finish at {gone} of {price.seeds} seeds ({low:.0%} to {high:.0%})."
            )
        found, p = price.beside_baseline, price.p_beside_corrected
        if found is not None and p is not None and p < 1 - LEVEL:
            numbers = (
                f"{found.mean:+.4f} ({100 * found.level:g} % interval {found.low:+.4f} to {found.high:+.4f}, corrected "
                f"p = {p:.2g}; {found.seeds} seeds)"
            )
            theirs = gone_of.get((baseline, price.factor), 0)
            # Who seems to pay less must not have lost more: what would have been bad is missing among its seeds.
            if (gone > theirs) if found.mean < 0 else (theirs > gone):
                sentences.append(
                    f"{where} the seeds that {price.method} and {baseline} both finished differ by {numbers}, in favor "
                    "of the one that lost more of them: nothing is said of its price."
                )
                continue
            word = "less" if found.mean < 0 else "more"
            sentences.append(
                f"{where} {price.method} pays {word} than {baseline} does at {price.factor:g} times its own: {numbers}."
            )
    if prices and not any(" pays " in sentence for sentence in sentences):
        sentences.append("At none of the other rates could a difference from the baseline's price be shown.")
    return sentences
