"""Confidence intervals and tests of paired differences, over seeds and examples, and minimum detectable differences.

Two methods are compared by ``D: (seeds, examples)``, the second's score minus the first's, for the same seed and the
same example. Both seeds and examples are samples: another seed or another held-out file gives another mean. So

    D[s, i] = µ + seed_s + example_i + rest_si

and the interval of µ must hold for new seeds *and* new examples.

- Examples are many and skewed: their part is bootstrapped, whole columns at a time, each resample divided by its own
  standard error (the bootstrap-t of B. Efron), so the interval is skewed like the data. Percentiles of the plain means
  are too narrow for a few dozen skewed examples. The bootstrap-t is too narrow for long tails on both sides, where
  Student's t is not: on each side, the wider of the two is used.
- Seeds are few. Resampling two of them gives the smaller and the larger as an "interval" with 50 % coverage, so their
  part is Student's t with ``seeds - 1`` degrees of freedom.
- Both half-widths are combined as ``half² = half_seeds² + half_examples²``, which is conservative
  (K. S. Banerjee, 1960; as "MOVER", G. Zou and A. Donner, 2008).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Difference",
    "detectable_difference",
    "holm",
    "mean_interval",
    "paired_difference",
    "paired_examples",
    "student_cdf",
    "student_quantile",
]

# Resamplings of the examples. The ends of a 95 % interval then vary by about 2 % of its width.
DRAWS = 4000
# Statistical power at which the minimum detectable difference is given.
POWER = 0.8
# Smaller p-values cannot be told apart with this number of resamplings. At levels above 95 % it is smaller in
# proportion: what is told apart there is Student's t and the most extreme resample.
SMALLEST_P = 2 / DRAWS
USUAL_LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference of means, with its interval and p-value.

    Attributes:
        mean: Mean over seeds and examples, in the score's unit.
        low, high: Ends of the interval for new seeds and new examples.
        p: Two-sided p-value of "no difference", not corrected for several tests; at least ``SMALLEST_P``, at
            levels above 95 % in proportion less.
        seed_deviation: Standard deviation between seeds of the difference of means.
        example_deviation: Standard deviation between examples of the difference, averaged over seeds.
        seeds, examples: How many.
        level: Confidence level of the interval.
        half_of_seeds, half_of_examples: What seeds and what examples add to the half-width: its square is the sum of
            their squares (of examples, the mean of both sides').
        half_at_best: The half-width that no number of seeds would narrow further, for these examples.
    """

    mean: float
    low: float
    high: float
    p: float
    seed_deviation: float
    example_deviation: float
    seeds: int
    examples: int
    level: float
    half_of_seeds: float = 0.0
    half_of_examples: float = 0.0
    half_at_best: float = 0.0


def paired_difference(
    differences: Sequence[Sequence[float]], level: float = 0.95, least_half: float = 0.0
) -> Difference:
    """Return interval and p-value of paired differences.

    Args:
        differences: One row per seed, one column per example: a method's score minus the baseline's.
        level: Confidence level of the interval, between 0 and 1.
        least_half: The interval is widened to this half-width where it is narrower, and p with it. Where seeds were
            added until the interval was as narrow as this, its own width is too small: it was chosen for being so.

    Returns:
        Mean, interval and p-value. They agree: the interval at ``level`` excludes 0 exactly if ``p < 1 - level``.

    Raises:
        UsageError: If there are fewer than two seeds or examples, rows differ in length, or a value is not finite.
    """
    import numpy as np

    if len({len(row) for row in differences}) > 1:
        raise UsageError(f"Rows of {sorted({len(row) for row in differences})} examples cannot be paired.")
    D = np.asarray(differences, dtype=float)  # (seeds, examples)
    if D.ndim != 2 or min(D.shape) < 2:
        raise UsageError(
            f"Differences of shape {D.shape} have no measurable noise; at least 2 seeds and 2 examples are needed."
        )
    if not np.isfinite(D).all():
        raise UsageError("A difference is NaN or infinite; a diverged run must be reported, not averaged.")
    if not 0 < level < 1:
        raise UsageError(f"level={level} must be between 0 and 1, both excluded.")
    seeds, examples = D.shape
    mean = float(D.mean())
    by_seed, by_example = D.mean(axis=1), D.mean(axis=0)
    seed_deviation, example_deviation = float(by_seed.std(ddof=1)), float(by_example.std(ddof=1))
    error = example_deviation / math.sqrt(examples)
    deviations = _studentized(by_example - by_example.mean()).tolist()  # (draws,), sorted

    def halves(alpha: float) -> tuple[float, float]:
        """Return how far the interval at ``1 - alpha`` extends below and above the mean."""
        of_seeds = student_quantile(1 - alpha / 2, seeds - 1) * seed_deviation / math.sqrt(seeds)
        least = student_quantile(1 - alpha / 2, examples - 1)
        # The upper tail of the resamples gives the lower end of the interval.
        left, right = _quantile(deviations, alpha / 2), _quantile(deviations, 1 - alpha / 2)
        return math.hypot(of_seeds, error * max(least, right)), math.hypot(
            of_seeds, error * max(least, -left)
        )

    below, above = halves(1 - level)
    wider = max(1.0, 2 * least_half / (below + above)) if below + above > 0 else 1.0

    def widened(alpha: float) -> tuple[float, float]:
        below, above = halves(alpha)
        return wider * below, wider * above

    below, above = widened(1 - level)
    of_seeds = student_quantile((1 + level) / 2, seeds - 1) * seed_deviation / math.sqrt(seeds)
    of_examples = math.sqrt(max(0.0, ((below + above) / 2 / wider) ** 2 - of_seeds**2))
    # A mean over seeds still has 1/seeds of what is left when seed and example are taken out, and more seeds shrink it.
    rest = D - by_seed[:, None] - by_example[None, :] + mean
    of_rest = float((rest**2).sum()) / ((seeds - 1) * (examples - 1)) / seeds
    kept = max(0.0, 1 - of_rest / example_deviation**2) if example_deviation > 0 else 0.0
    return Difference(
        mean=mean,
        low=mean - below,
        high=mean + above,
        p=_p_value(mean, widened, SMALLEST_P * min(1.0, (1 - level) / (1 - USUAL_LEVEL))),
        seed_deviation=seed_deviation,
        example_deviation=example_deviation,
        seeds=seeds,
        examples=examples,
        level=level,
        half_of_seeds=of_seeds,
        half_of_examples=of_examples,
        half_at_best=of_examples * math.sqrt(kept),
    )


def paired_examples(differences: Sequence[float], level: float = 0.95) -> Difference:
    """Return interval and p-value of two models' differences on the same examples; not of the methods, over seeds.

    Args:
        differences: One per example, at least 2.
        level: Confidence level of the interval.

    Returns:
        As ``paired_difference``, with the examples' part only.
    """
    # Equal rows have no variance between seeds; only the examples' remains.
    return paired_difference([list(differences)] * 2, level)


def _quantile(rising: Sequence[float], share: float) -> float:
    """Return the value below which a share of sorted values lies, between two of them linearly, as NumPy does."""
    place = share * (len(rising) - 1)
    below = min(int(place), len(rising) - 2)
    return rising[below] + (rising[below + 1] - rising[below]) * (place - below)


def _p_value(mean: float, halves: Any, smallest: float) -> float:
    """Find by bisection the alpha whose interval just touches 0: the interval shrinks as alpha grows."""
    if mean == 0:
        return 1.0

    def excludes(alpha: float) -> bool:
        below, above = halves(alpha)
        return bool(mean - below > 0 or mean + above < 0)

    low, high = smallest, 1.0  # 0 is excluded at ``high``, unless it never is
    if excludes(low):
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if excludes(middle) else (middle, high)
    return high


def _studentized(centered: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return (mean ÷ standard error) of every resample of values whose mean is 0, sorted: ``(draws,)``."""
    import numpy as np

    weights = _resampling(len(centered))
    means = weights @ centered
    variances = weights @ centered**2 - means**2
    errors = np.sqrt(np.clip(variances, 0, None) / (len(centered) - 1))
    # A resample of one example only has no variance: its ratio is infinite, or 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(means == 0, 0.0, means / errors)
    # Clipped, so that the interval is finite for two or three examples.
    return np.sort(np.clip(ratios, -1e6, 1e6))


@lru_cache(maxsize=8)
def _resampling(examples: int) -> np.ndarray[Any, Any]:
    """Return how often each example is drawn, as a share, always the same: ``(draws, examples)``."""
    import numpy as np

    counts = np.random.default_rng(0).multinomial(examples, [1 / examples] * examples, size=DRAWS)
    return counts / examples


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return Student's interval for a mean of a few values, such as a score over seeds.

    Args:
        values: At least one; the interval of a single value is infinite.
        level: Confidence level of the interval.

    Raises:
        UsageError: If there is no value.
    """
    if not values:
        raise UsageError("There is no value to average.")
    if len(values) == 1:
        return -math.inf, math.inf
    half = student_quantile((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values of several tests, so that the family-wise error rate is at most the level (S. Holm, 1979).

    Args:
        p_values: One per test.

    Returns:
        Holm-corrected p-values, in the same order, to be compared with the level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def detectable_difference(
    seed_deviation: float,
    example_deviation: float,
    seeds: int,
    examples: int,
    level: float = 0.95,
    comparisons: int = 1,
) -> float:
    """Return the minimum detectable difference of a comparison at 80 % power.

    Args:
        seed_deviation: Standard deviation between seeds of the difference of means.
        example_deviation: Standard deviation between examples of the difference, averaged over seeds.
        seeds, examples: How many, at least 2 each.
        level: Confidence level of the test.
        comparisons: The number of tests for which p-values are corrected (Holm's first step).

    Returns:
        In the unit of the deviations: half the interval's width plus the noise at the given power.
    """
    upper = 1 - (1 - level) / comparisons / 2
    of_seeds, of_examples = seed_deviation / math.sqrt(seeds), example_deviation / math.sqrt(examples)
    half = math.hypot(
        student_quantile(upper, seeds - 1) * of_seeds, student_quantile(upper, examples - 1) * of_examples
    )
    return half + NormalDist().inv_cdf(POWER) * math.hypot(of_seeds, of_examples)


# --- Student's t, without a package for it -------------------------------------------------------------------


def student_cdf(t: float, freedom: int) -> float:
    """Return the probability that Student's t is at most ``t``.

    Args:
        t: Any number.
        freedom: Degrees of freedom, at least 1.

    Returns:
        By the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    if freedom > 400:  # the normal distribution with Cornish and Fisher's first term is exact to 1e-6
        return NormalDist().cdf(t * (1 - 1 / (4 * freedom)) / math.sqrt(1 + t * t / (2 * freedom)))
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if freedom % 2 else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if freedom % 2 else sine * total
    return (1 + inside) / 2


@lru_cache(maxsize=4096)
def student_quantile(probability: float, freedom: int) -> float:
    """Return the ``t`` below which Student's distribution has a probability.

    Args:
        probability: Between 0 and 1, both excluded.
        freedom: Degrees of freedom, at least 1.

    Raises:
        UsageError: If either is out of range.

    Example:
        >>> round(student_quantile(0.975, 4), 3)
        2.776
    """
    if not 0 < probability < 1 or freedom < 1:
        raise UsageError(f"probability={probability} must be inside (0, 1) and freedom={freedom} above 0.")
    if probability < 0.5:
        return -student_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
        if high > 1e12:
            return high
    # Newton's steps, and a bisection wherever one would leave the bracket or gain nothing.
    logarithm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    t = (low + high) / 2
    for _ in range(200):
        missing = student_cdf(t, freedom) - probability
        low, high = (t, high) if missing < 0 else (low, t)
        density = math.exp(logarithm - (freedom + 1) / 2 * math.log1p(t * t / freedom))
        following = t - missing / density if density > 0 else low
        if not low < following < high:
            following = (low + high) / 2
        if following in (low, high) or abs(following - t) <= 4e-16 * t:
            break
        t = following
    return t
