"""Laws of how many seeds a confirmation takes: its error rate is kept, and means play no part."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moslora.metrics.intervals import Difference, paired_difference, student_quantile
from moslora.metrics.sequential import (
    FIRST,
    GROWTH,
    Goal,
    Look,
    half_width,
    is_enough,
    level_of_look,
    needed_seeds,
    settle,
)

Rows = np.ndarray[Any, Any]


def draw(
    rng: np.random.Generator, seeds: int, seed: float = 1.0, example: float = 0.0, many: int = 12
) -> Rows:
    """Differences of two methods that are the same: ``(seeds, many)``."""
    rest = 0.01 * rng.standard_normal((seeds, many))
    return seed * rng.standard_normal((seeds, 1)) + example * rng.standard_normal((1, many)) + rest


def test_the_levels_of_all_verdicts_together_are_five_percent():
    spent = [1 - level_of_look(look) for look in range(1, 30)]
    assert sum(spent) == pytest.approx(0.05, abs=1e-9) and all(a > b for a, b in pairwise(spent))


def _students(rows: Any, level: float, least_half: float = 0.0) -> Difference:
    """Student's interval over seeds, examples left out: quick, and exact for what ``draw`` gives without examples."""
    means = np.asarray(rows).mean(axis=1)
    mean, deviation, seeds = float(means.mean()), float(means.std(ddof=1)), len(means)
    half = student_quantile((1 + level) / 2, seeds - 1) * deviation / math.sqrt(seeds)
    wide = max(half, least_half)
    return Difference(mean, mean - wide, mean + wide, math.nan, deviation, 0.0, seeds, 2, level, half)


def test_identical_methods_are_told_apart_no_more_often_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a fixed number, by width, and by a user who goes on after every verdict that found nothing.

    ``benchmarks/sequential.py`` has the same with examples, long tails and the package's own intervals.
    """
    monkeypatch.setattr("moslora.metrics.sequential.paired_difference", _students)
    rng, trials = np.random.default_rng(1), 3000
    wrong = {"fixed": 0, "width": 0, "peeker": 0, "plain": 0}
    for _ in range(trials):
        rows = rng.standard_normal((80, 1))
        wrong["fixed"] += _differs(settle(rows[:10], Goal(10)).difference)
        first = settle(rows, Goal(40, 0.45))
        assert first.looks is not None
        wrong["width"] += _differs(first.difference)
        second = settle(rows, Goal(80, 0.3), first.looks)
        wrong["peeker"] += _differs(first.difference) or _differs(second.difference)
        plain = (_students(rows[:seeds], 0.95) for seeds in range(5, 81))
        wrong["plain"] += _differs(next(one for one in plain if half_width(one) <= 0.45))
    # Three standard errors above 4, 4 and 5 %.
    for rule, level in {"fixed": 0.04, "width": 0.04, "peeker": 0.05}.items():
        assert wrong[rule] / trials <= level + 3 * math.sqrt(level * (1 - level) / trials), (rule, wrong)
    assert wrong["plain"] / trials > 0.06, "without the rules the error rate would not be kept"


def _differs(found: Any) -> bool:
    return bool(found.low > 0 or found.high < 0)


@given(st.integers(0, 10**6), st.floats(-50, 50))
def test_when_to_stop_does_not_depend_on_the_difference(number, shift):
    rows = draw(np.random.default_rng(number), 40)
    goal = Goal(40, 0.5)
    plain, shifted = settle(rows, goal), settle(rows + shift, goal)
    assert plain.seeds == shifted.seeds and plain.looks == shifted.looks


@given(st.integers(0, 10**6), st.integers(0, 40))
def test_seeds_added_one_by_one_settle_as_all_at_once(number, start):
    rows = draw(np.random.default_rng(number), 40)
    goal, there = Goal(40, 0.5), start
    whole = settle(rows, goal)
    while (found := settle(rows[:there], goal)).looks is None:
        assert found.seeds > there
        there = found.seeds
    assert (found.looks, found.seeds) == (whole.looks, whole.seeds)


def test_an_interval_that_was_waited_for_is_no_narrower_than_asked_and_says_so_again():
    rows = draw(np.random.default_rng(5), 80)
    goal = Goal(80, 0.6)
    found = settle(rows, goal)
    assert FIRST <= found.seeds < 80 and found.looks == [Look(found.seeds, 0.6)]
    assert half_width(found.difference) == pytest.approx(0.6)  # type: ignore[arg-type]
    own = paired_difference(rows[: found.seeds], level_of_look(1))
    assert half_width(own) < 0.6 and own.p <= found.difference.p  # type: ignore[union-attr]
    again = settle(rows, goal, found.looks)
    assert (again.looks, again.difference) == (found.looks, found.difference)


def test_more_seeds_after_a_verdict_are_a_second_one_at_its_own_level():
    rows = draw(np.random.default_rng(6), 40)
    first = settle(rows[:10], Goal(10))
    assert first.looks == [Look(10)] and first.difference.level == level_of_look(1)  # type: ignore[union-attr]
    wanting = settle(rows[:10], Goal(20), first.looks)
    assert wanting.looks is None and wanting.seeds == 20
    second = settle(rows, Goal(20), first.looks)
    assert second.looks == [Look(10), Look(20)]
    assert second.difference == paired_difference(rows[:20], level_of_look(2))
    # What was judged stays judged: fewer seeds, or a wider interval, are there already.
    for goal in (Goal(5), Goal(10), Goal(40, 5.0)):
        assert settle(rows, goal, first.looks).looks == first.looks
    narrower = settle(rows, Goal(40, 0.5), first.looks)
    assert narrower.seeds >= math.ceil(10 * GROWTH)


def test_where_examples_are_the_limit_seeds_are_not_added_for_ever():
    rows = draw(np.random.default_rng(7), 200, seed=0.3, example=1.0, many=60)
    found = settle(rows, Goal(200, 0.05))
    assert found.looks is not None and found.seeds < 60
    assert found.difference.half_at_best > 0.05  # type: ignore[union-attr]
    assert needed_seeds(found.difference, 0.05) == math.inf  # type: ignore[arg-type]
    assert is_enough(found.difference, 0.05)  # type: ignore[arg-type]
    # Twenty times the seeds narrow it hardly more than was foretold.
    far = paired_difference(draw(np.random.default_rng(7), 4000, 0.3, 1.0, 60), found.difference.level)  # type: ignore[union-attr]
    assert half_width(far) > 0.9 * far.half_at_best > 0.05


def test_the_parts_of_a_half_width_join_as_roots_of_squares():
    found = paired_difference(draw(np.random.default_rng(8), 6, 1.0, 1.0, 30))
    joined = math.hypot(found.half_of_seeds, found.half_of_examples)
    assert joined == pytest.approx(half_width(found)) and found.half_at_best <= found.half_of_examples


def test_lost_seeds_count_as_seeds_and_pair_with_nothing():
    rows: list[Any] = list(draw(np.random.default_rng(9), 10))
    rows[3] = rows[7] = None
    found = settle(rows, Goal(10))
    assert found.seeds == 10 and found.difference.seeds == 8  # type: ignore[union-attr]
    lost = settle([None] * 10, Goal(10, 0.1))
    assert lost.looks == [Look(10, 0.1)] and lost.difference is None


def test_the_documented_error_rates_are_the_measured_ones_and_those_of_identical_methods_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import sequential

    page = tmp_path / "compare.md"
    page.write_bytes((root / "docs" / "compare.md").read_bytes())
    kept = json.loads(sequential.KEPT.read_text())
    sequential.write_table(page, kept)
    assert page.read_bytes() == (root / "docs" / "compare.md").read_bytes()
    for world in kept["worlds"]:
        if not world["world"].startswith("not identical"):
            for rule, level in {"fixed": 0.04, "width": 0.04, "peeker": 0.05}.items():
                error = math.sqrt(level * (1 - level) / world["trials"])
                assert world["wrong"][rule] <= level + 3 * error, (world, rule)
