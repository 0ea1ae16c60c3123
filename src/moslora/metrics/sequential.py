"""How many seeds a confirmation takes, and at which level each of its verdicts is given.

Seeds are added until the interval of a paired difference is as narrow as asked, never until a difference is
significant: at every look only spreads are asked for, not means. Still the spread at which one stops is too small, as
it was chosen for being small, and Student's interval from it then covers 91 to 93 % instead of 95
(``benchmarks/sequential.py``; Y. S. Chow and H. Robbins, 1965; G. Simons, 1968). Three rules keep the level:

- the first look is at ``FIRST`` seeds, and each has at least ``GROWTH`` times those of the one before;
- an interval that was waited for is reported no narrower than the width that was asked for, and p accordingly;
- a verdict that is followed by another on more seeds has been seen, whatever the reason to go on. The levels of all of
  them together are 5 %: four fifths for the first, a tenth for the second, a twentieth for the third and so on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moslora.metrics.intervals import Difference, paired_difference

__all__ = [
    "FIRST",
    "Goal",
    "Look",
    "Settled",
    "half_width",
    "is_enough",
    "level_of_look",
    "needed_seeds",
    "next_look",
    "settle",
]

# Seeds at the first look, and how much more the next has at least.
FIRST, GROWTH = 8, 1.25
# The next look is at this share of the seeds that the spread says are needed, so that there are few of them and none
# is far too late.
CAUTION = 0.75
# Nor has a look more than this many times the seeds of the one before, whose spread may be too large by chance.
LARGEST_STEP = 3
# The first verdict's share of the level; each later one has half of what is left.
FIRST_SHARE = 0.8
# Where examples are the limit, seeds are added until the interval is within this factor of what they allow at best.
NEAR = 1.1


def level_of_look(look: int, level: float = 0.95) -> float:
    """Return the confidence level of the interval of a verdict, so that all verdicts together keep the level.

    Args:
        look: 1 for the first verdict, 2 for the next one on more seeds, and so on.
        level: Of all of them together.

    Example:
        >>> [round(level_of_look(look), 4) for look in (1, 2, 3)]
        [0.96, 0.995, 0.9975]
    """
    share = FIRST_SHARE if look == 1 else (1 - FIRST_SHARE) * 0.5 ** (look - 1)
    return 1 - (1 - level) * share


def half_width(difference: Difference) -> float:
    """Return half of the distance between the ends of an interval."""
    return (difference.high - difference.low) / 2


def needed_seeds(difference: Difference, width: float) -> float:
    """Return about how many seeds give an interval of a half-width; infinite where the examples do not allow it.

    Args:
        difference: On the seeds so far.
        width: The half-width asked for.
    """
    best, now = difference.half_at_best, half_width(difference)
    if now <= width:
        return difference.seeds
    if best >= width:
        return math.inf
    return difference.seeds * (now**2 - best**2) / (width**2 - best**2)


def is_enough(difference: Difference, width: float) -> bool:
    """Tell whether an interval is as narrow as asked, or as narrow as more seeds could make it.

    Args:
        difference: On the seeds so far.
        width: The half-width asked for.
    """
    now, best = half_width(difference), difference.half_at_best
    return now <= width * (1 + 1e-9) or (best >= width and now <= NEAR * best)


def next_look(difference: Difference, width: float) -> int:
    """Return at how many seeds to look next; it depends on spreads alone.

    Args:
        difference: On the seeds so far, not yet enough.
        width: The half-width asked for.
    """
    least = math.ceil(difference.seeds * GROWTH)
    best = difference.half_at_best
    # Where the examples are the limit, the aim is to come near what they allow.
    needed = needed_seeds(difference, width if best < width else NEAR * best)
    likely = min(CAUTION * needed, LARGEST_STEP * difference.seeds)
    return max(least, math.floor(likely))


@dataclass(frozen=True)
class Goal:
    """What a confirmation is to reach.

    Attributes:
        seeds: How many, or with a width at most.
        width: Half-width of the interval, in the measure's unit; None for just so many seeds.
    """

    seeds: int
    width: float | None = None


@dataclass(frozen=True)
class Look:
    """A verdict that was given.

    Attributes:
        seeds: On how many.
        width: The half-width that was waited for; None for none.
    """

    seeds: int
    width: float | None = None


@dataclass(frozen=True)
class Settled:
    """Where one contrast stands.

    Attributes:
        seeds: How many it was settled on, or how many are wanted for the next look.
        looks: The verdicts given, this one the last; None while more seeds are wanted.
        difference: On the seeds so far, of the last look; None where fewer than two seeds have both methods.
    """

    seeds: int
    looks: Sequence[Look] | None
    difference: Difference | None


def settle(
    rows: Sequence[Sequence[float] | None], goal: Goal, looks: Sequence[Look] = (), level: float = 0.95
) -> Settled:
    """Decide whether a contrast has seeds enough, from its seeds in order and nothing else.

    So a comparison that was stopped, or ran on other machines, decides the same.

    Args:
        rows: Of each seed that both methods have, the differences of the examples; None where one of them was lost.
        goal: What is asked for.
        looks: The verdicts that were given before, on these same seeds. Seeds that were judged stay judged.
        level: Of all verdicts together.
    """
    waits = goal.width
    start = goal.seeds if waits is None else min(FIRST, goal.seeds)
    if looks:
        last = looks[-1]
        if len(rows) < last.seeds:
            return Settled(last.seeds, None, None)
        told = _difference(rows[: last.seeds], level_of_look(len(looks), level), last.width)
        if last.seeds >= goal.seeds or (waits is not None and told is not None and is_enough(told, waits)):
            return Settled(last.seeds, looks, told)
        start = max(start, min(math.ceil(last.seeds * GROWTH), goal.seeds))
    elif waits is None:
        start = max(start, len(rows))  # fewer seeds are not asked for once they are there
    seeds, own_level, seen = start, level_of_look(len(looks) + 1, level), None
    while len(rows) >= seeds:
        seen = _difference(rows[:seeds], own_level, None)
        enough = waits is not None and seen is not None and is_enough(seen, waits)
        if enough or seeds >= goal.seeds:
            told = _difference(rows[:seeds], own_level, waits)
            return Settled(seeds, [*looks, Look(seeds, waits)], told)
        following = math.ceil(seeds * GROWTH) if seen is None or waits is None else next_look(seen, waits)
        seeds = min(max(following, seeds + 1), goal.seeds)
    return Settled(seeds, None, seen)


def _difference(
    rows: Sequence[Sequence[float] | None], level: float, width: float | None
) -> Difference | None:
    whole = [row for row in rows if row is not None]
    return paired_difference(whole, level, width or 0.0) if len(whole) > 1 else None
