from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moslora.metrics.intervals import (
    SMALLEST_P,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
    student_cdf,
    student_quantile,
)

# From the printed tables, which end at three decimals.
TABLE = {(0.975, 1): 12.706, (0.975, 2): 4.303, (0.95, 4): 2.132, (0.995, 9): 3.250, (0.975, 60): 2.000}


@pytest.mark.parametrize(("place", "printed"), TABLE.items())
def test_students_quantiles_are_those_of_the_printed_tables(place, printed):
    assert student_quantile(*place) == pytest.approx(printed, abs=5e-4)


@given(st.integers(1, 900), st.floats(0.001, 0.999))
def test_quantile_and_distribution_undo_each_other(freedom, probability):
    assert student_cdf(student_quantile(probability, freedom), freedom) == pytest.approx(
        probability, abs=1e-9
    )


def test_many_degrees_of_freedom_join_the_exact_sums_without_a_step():
    exact, bent = student_cdf(2.0, 400), student_cdf(2.0, 401)
    assert abs(exact - bent) < 1e-5
    assert student_cdf(1.0, 10**6) == pytest.approx(NormalDist().cdf(1.0), abs=1e-6)


def test_where_only_seeds_differ_the_interval_is_students():
    D = [[mean] * 7 for mean in (1.0, 2.0, 3.0)]
    found = paired_difference(D)
    half = 4.302653 * 1.0 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half), abs=1e-5)
    # t = 2·√3 with two degrees of freedom: p = 2·(1 - F(3.4641)), F in closed form.
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-6)


def test_seeds_and_examples_widen_the_interval_as_roots_of_squares():
    seeds, examples = np.array([[-0.3], [0.0], [0.6]]), np.linspace(-1, 2, 30)
    both = paired_difference(seeds + examples)
    of_seeds = paired_difference(np.tile(seeds, 30))
    of_examples = paired_difference(np.tile(examples, (3, 1)))
    for side in ("low", "high"):
        parts = [getattr(d, side) - d.mean for d in (of_seeds, of_examples)]
        assert abs(getattr(both, side) - both.mean) == pytest.approx(math.hypot(*parts))


def test_an_interval_leaves_out_zero_just_where_p_is_below_the_level():
    rng = np.random.default_rng(3)
    for shift in np.linspace(0, 1, 15):
        found = paired_difference(shift + rng.standard_normal((4, 1)) * 0.2 + rng.standard_normal((4, 20)))
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)


def test_methods_that_are_the_same_differ_by_nothing():
    found = paired_difference(np.zeros((2, 5)))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_a_difference_beyond_doubt_has_the_smallest_p_that_is_told_apart():
    D = 5 + 1e-6 * np.random.default_rng(0).standard_normal((6, 40))
    assert paired_difference(D).p == SMALLEST_P


# Spreads of what a seed, an example and their meeting add to each method's score.
NOISES = {"seeds": (1, 0, 0), "examples": (0, 1, 0), "rest": (0, 0, 1), "all": (0.2, 1, 0.5)}


@pytest.mark.parametrize("skewed", [False, True], ids=["normal", "skewed"])
@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("seeds", [2, 4])
def test_identical_methods_are_declared_different_no_more_often_than_the_level_says(noise, skewed, seeds):
    """``lora`` against ``lora``: both scores are drawn from one distribution, again and again."""
    rng = np.random.default_rng([seeds, skewed, *(int(10 * n) for n in noise)])

    def draw(*shape: int) -> np.ndarray:
        return rng.lognormal(0, 1, shape) if skewed else rng.standard_normal(shape)

    examples, times, level = 30, 200, 0.05
    found = 0
    for _ in range(times):
        shared = 3 * draw(1, examples)  # hard examples are hard for both
        one, two = (
            shared
            + noise[0] * draw(seeds, 1)
            + noise[1] * draw(1, examples)
            + noise[2] * draw(seeds, examples)
            for _ in range(2)
        )
        found += paired_difference(two - one).p < level
    # 200 trials of a 5 % event give more than this once in a thousand times.
    assert found <= times * level + 3.1 * math.sqrt(times * level * (1 - level))


def test_a_difference_that_could_be_seen_is_seen_four_times_out_of_five():
    rng, seeds, examples = np.random.default_rng(5), 4, 50
    size = detectable_difference(0.3, 1.0, seeds, examples)
    times = 200
    seen = 0
    for _ in range(times):
        D = size + 0.3 * rng.standard_normal((seeds, 1)) + rng.standard_normal((1, examples))
        seen += paired_difference(D).p < 0.05
    assert 0.7 < seen / times < 0.92


def test_more_data_shows_smaller_differences_and_more_tests_only_larger_ones():
    size = detectable_difference(1.0, 1.0, 3, 50)
    assert detectable_difference(1.0, 1.0, 6, 50) < size
    assert detectable_difference(1.0, 1.0, 3, 500) < size
    assert detectable_difference(1.0, 1.0, 3, 50, comparisons=4) > size


def test_holms_steps_are_those_of_a_hand_calculation():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values):
    corrected = holm(values)
    assert all(value <= after <= 1 for value, after in zip(values, corrected, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [corrected[i] for i in order] == sorted(corrected)


def test_a_single_seed_shows_no_noise():
    assert mean_interval([1.0]) == (-math.inf, math.inf)
    low, high = mean_interval([1.0, 3.0])
    assert (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([[1.0, 2.0]], "at least 2 seeds"),
        ([[1.0], [2.0]], "at least 2 seeds and 2 examples"),
        ([[1.0, 2.0], [1.0]], "cannot be paired"),
        ([[1.0, math.nan], [1.0, 2.0]], "NaN"),
    ],
)
def test_what_cannot_be_judged_is_refused(differences, said):
    with pytest.raises(ValueError, match=said):
        paired_difference(differences)
