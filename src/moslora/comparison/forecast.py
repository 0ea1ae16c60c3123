"""What a second stage takes and can show, said before it begins and again as it goes; never what it finds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from moslora.comparison.cell_files import read_cells
from moslora.comparison.confirmed import Asked, Found, rows_of, settle_pair
from moslora.comparison.plan import Comparison
from moslora.comparison.results import Cell, Verdict
from moslora.metrics.intervals import (
    Difference,
    detectable_difference,
    paired_difference,
    student_quantile,
)
from moslora.metrics.sequential import FIRST, Goal, half_width, is_enough, level_of_look, needed_seeds
from moslora.wording import duration

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["expected_seeds", "say_second_stage", "say_widths", "seconds_of_cells", "spreads"]

# No forecast goes beyond; it is as good as never.
NEVER = 100_000


def expected_seeds(difference: Difference, width: float, level: float) -> float:
    """Return how many seeds an interval of a half-width is likely to take, by the spread of a few.

    Args:
        difference: Of a few seeds.
        width: The half-width.
        level: Of the interval.

    Returns:
        Infinite where the examples do not allow it.
    """
    room = width**2 - difference.half_at_best**2
    if room <= 0:
        return math.inf

    def is_narrow(seeds: int) -> bool:
        half = student_quantile((1 + level) / 2, seeds - 1) * difference.seed_deviation / math.sqrt(seeds)
        return half**2 <= room

    low, high = 1, 2
    while not is_narrow(high):
        low, high = high, 2 * high
        if high > NEVER:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_narrow(middle) else (middle, high)
    return high


def spreads(
    asked: Sequence[Asked], found: Found, tuned: Verdict, examples: int
) -> Mapping[tuple[str, str], Difference]:
    """Return what is known of each contrast's spread: from fresh seeds, else from the first stage's.

    Args:
        asked: The contrasts.
        found: Fresh seeds.
        tuned: The first stage's verdict.
        examples: Held-out examples of this stage.
    """
    known = {}
    for one in asked:
        rows = [row for row in rows_of(found.of(one.pair[0]), found.of(one.pair[1])) if row is not None]
        if len(rows) >= min(FIRST, 4):
            known[one.pair] = paired_difference(rows, level_of_look(len(one.looks) + 1))
            continue
        for contrast in tuned.contrasts:
            if (contrast.method, contrast.baseline) == one.pair and contrast.measure == "loss":
                narrower = math.sqrt(contrast.difference.examples / examples)
                known[one.pair] = dataclasses.replace(
                    contrast.difference,
                    half_at_best=contrast.difference.half_at_best * narrower,
                    half_of_examples=contrast.difference.half_of_examples * narrower,
                )
    return known


def seconds_of_cells(
    plan: Comparison, rates: Mapping[str, float], there: Sequence[Cell], examples: int
) -> dict[str, float]:
    """Return about how long a cell of each method takes, by those of this stage, else by the first stage's.

    Args:
        plan: Of the second stage.
        rates: The methods' rates.
        there: Cells of this stage.
        examples: Held-out examples of this stage.
    """
    tuning = read_cells(dataclasses.replace(plan, stage=1))
    known = {}
    for name, rate in rates.items():
        own = [cell.cell_seconds for cell in there if cell.method == name and cell.status == "done"]
        if not own:
            own = [
                cell.seconds
                + max(0.0, cell.cell_seconds - cell.seconds)
                * examples
                / (len(cell.test) + len(cell.validation or ()))
                for cell in tuning
                if cell.method == name and cell.learning_rate == rate and cell.test
            ]
        if own:
            known[name] = median(own)
    # A method that has not run yet takes about what the others take.
    usual = median(known.values()) if known else None
    return known if usual is None else {name: known.get(name, usual) for name in rates}


def say_second_stage(
    plan: Comparison,
    found: Found,
    asked: Sequence[Asked],
    goal: Goal,
    priced: tuple[int, int],
    away_left: Mapping[str, int],
    tuned: Verdict,
    examples: int,
    workers: int,
    display: Display,
) -> None:
    """Say what is about to be trained, how long it takes, and how small a difference it can show.

    Args:
        plan: Of the second stage.
        found: What is there of it.
        asked: The contrasts.
        goal: What is to be reached.
        priced: How many other rates of each method, and on how many seeds.
        away_left: How many of their cells are missing, by method.
        tuned: The first stage's verdict.
        examples: Held-out examples.
        workers: Cells at the same time.
        display: Where to say it.
    """
    known = spreads(asked, found, tuned, examples)
    rates = ", ".join(f"{name} at {rate:g}" for name, rate in found.rates.items())
    display.say(
        f"Second stage: {rates}, on fresh seeds that chose no rate, judged by the loss of {examples} held-out "
        "examples. No loss is shown before the end, so that nobody stops because of one."
    )
    many = dict.fromkeys(found.rates, priced[1])
    lines, is_known = [], True
    for one in asked:
        name, spread = " less ".join(one.pair), known.get(one.pair)
        level = level_of_look(len(one.looks) + 1)
        seeds: float = goal.seeds
        if goal.width is None and spread is not None:
            size = detectable_difference(
                spread.seed_deviation, spread.example_deviation, goal.seeds, examples, level, len(asked)
            )
            lines.append(f"{name}: a difference of about {size:.2g} would be seen four times out of five")
        elif goal.width is not None and spread is not None:
            wanted = max(expected_seeds(spread, goal.width, level), FIRST)
            seeds = min(wanted, goal.seeds)
            if math.isinf(wanted):
                best = spread.half_at_best
                lines.append(
                    f"{name}: no number of seeds would do, the examples alone keep it at ±{best:.2g}"
                )
            else:
                beyond = ", more than allowed" if wanted > goal.seeds else ""
                lines.append(f"{name}: about {wanted:.0f} seeds{beyond}")
        elif goal.width is not None:
            is_known, seeds = False, min(FIRST, goal.seeds)
        for method in one.pair:
            many[method] = max(many[method], int(seeds))
    away = priced[0] * priced[1] * len(found.rates)
    cells = sum(many.values()) + away
    asks = (
        f"{goal.seeds} seeds each"
        if goal.width is None
        else f"until each interval is no wider than ±{goal.width:g} nats per token (half-width), on {FIRST} to "
        f"{goal.seeds} seeds"
    )
    about = "" if goal.width is None else "about " if is_known else "at least "
    text = f"It takes {asks}: {about}{cells} cells" + (f", {away} of them at other rates" if away else "")
    cost = seconds_of_cells(plan, found.rates, list(found.cells.values()), examples)
    if cost:
        left = sum(cost[name] * max(0, number - len(found.of(name))) for name, number in many.items())
        left += sum(cost[name] * number for name, number in away_left.items())
        text += f", {duration(left / workers)} at the pace so far"
    else:
        text += "; how long that takes is said after the first cell"
    display.say(f"{text}.")
    for line in lines:
        display.say(f"  {line}.")
    if not is_known:
        display.say(f"  The spread of the first {FIRST} seeds says how many are needed.")


def say_widths(found: Found, asked: Sequence[Asked], goal: Goal, display: Display) -> None:
    """Say how narrow the intervals are by now, and how many seeds they are likely to take.

    Args:
        found: What is there.
        asked: The contrasts.
        goal: What is to be reached.
        display: Where to say it.
    """
    if goal.width is None:
        return
    for one in asked:
        settled = settle_pair(found, one, goal)
        if settled.difference is None:
            continue
        now = half_width(settled.difference)
        if settled.looks is not None:
            rest = "enough" if is_enough(settled.difference, goal.width) else "the most seeds allowed"
        else:
            wanted = needed_seeds(settled.difference, goal.width)
            likely = "the examples are the limit" if math.isinf(wanted) else f"about {wanted:.0f} in all"
            rest = f"{likely}; next look at {settled.seeds}"
        display.say(
            f"  {' less '.join(one.pair)}: ±{now:.2g} after {settled.difference.seeds} seeds "
            f"(asked ±{goal.width:g}): {rest}."
        )
