"""Bootstrap intervals of metrics over examples, of one model and of the difference of two.

Drawing examples with replacement gives other counts of them, and the spread of a metric over such draws is its interval
(B. Efron, 1979). Two models are compared by the same draws of the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.metrics.answers import wilson_interval
from moslora.metrics.scored import Scores

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["Compared", "compare_scores", "measure_scores"]

# Resamplings; the ends of a 95 % interval then vary by about 3 % of its width.
DRAWS = 1000
# Entries of the counts that are in memory at once.
ENTRIES = 10_000_000


@dataclass(frozen=True)
class Compared:
    """A metric of two models on the same examples.

    Attributes:
        base, tuned: Its values.
        base_interval, tuned_interval: Their 95 % intervals; None where all draws give one number.
        difference: Tuned less base.
        low, high: The difference's 95 % interval, from the same draws of the same examples.
    """

    base: float
    tuned: float
    base_interval: tuple[float, float] | None
    tuned_interval: tuple[float, float] | None
    difference: float
    low: float
    high: float


def measure_scores(scores: Scores) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return the metrics and their 95 % intervals over examples.

    Args:
        scores: At least one example.
    """
    import numpy as np

    values = {name: float(value[0]) for name, value in scores.measure(np.ones((1, scores.examples))).items()}
    intervals = {}
    for name, drawn in _drawn(scores).items():
        low, high = np.quantile(drawn, [0.025, 0.975])
        intervals[name] = (min(float(low), values[name]), max(float(high), values[name]))
    return values, _with_width(scores, intervals)


def compare_scores(base: Scores, tuned: Scores) -> dict[str, Compared]:
    """Compare the metrics of two models.

    Args:
        base, tuned: Of the same examples, in the same order.

    Returns:
        By name.

    Raises:
        UsageError: If they are of different numbers of examples.
    """
    import numpy as np

    if base.examples != tuned.examples:
        raise UsageError(f"{base.examples} and {tuned.examples} examples cannot be paired.")
    one, one_ends = measure_scores(base)
    two, two_ends = measure_scores(tuned)
    before, after = _drawn(base), _drawn(tuned)
    found = {}
    for name in one:
        low, high = np.quantile(after[name] - before[name], [0.025, 0.975])
        found[name] = Compared(
            one[name],
            two[name],
            one_ends.get(name),
            two_ends.get(name),
            two[name] - one[name],
            float(low),
            float(high),
        )
    return found


def _drawn(scores: Scores) -> dict[str, Array]:
    """Return the metrics of every draw, ``(draws,)`` each."""
    import numpy as np

    parts = [scores.measure(counts) for counts in _draws(scores.examples)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _draws(examples: int) -> Iterator[Array]:
    """Yield how often each example is drawn, always the same, ``(some draws, examples)`` at a time."""
    import numpy as np

    if examples <= 2000:
        yield _all_draws(examples)
        return
    generator = np.random.default_rng(0)
    at_once = max(1, ENTRIES // examples)
    for start in range(0, DRAWS, at_once):
        many = min(at_once, DRAWS - start)
        yield generator.multinomial(examples, [1 / examples] * examples, size=many).astype(float)


@lru_cache(maxsize=4)
def _all_draws(examples: int) -> Array:
    import numpy as np

    return np.random.default_rng(0).multinomial(examples, [1 / examples] * examples, size=DRAWS).astype(float)


def _with_width(scores: Scores, intervals: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Give the share of right examples Wilson's interval, and leave out intervals of no width.

    Where a model says the same of all examples, or is right about every one, each draw gives the same number: how
    uncertain it is cannot be told from draws.
    """
    right = scores.right
    if scores.share and right is not None:
        intervals[scores.share] = wilson_interval(int(right.sum()), len(right))
    return {name: ends for name, ends in intervals.items() if ends[0] < ends[1] or name == scores.share}
