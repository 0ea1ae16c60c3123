from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moslora.metrics.answers import ANSWER_METRICS, json_equal, text_equal, wilson_interval

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("aä\n"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_json_is_equal_however_it_is_laid_out(value):
    assert json_equal(json.dumps(value, indent=3), json.dumps(value, sort_keys=True, ensure_ascii=False))


@given(VALUES, VALUES)
def test_json_equality_is_symmetric(a, b):
    a, b = json.dumps(a), json.dumps(b)
    assert json_equal(a, b) == json_equal(b, a)


@pytest.mark.parametrize(
    ("answer", "reference", "equal"),
    [
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', True),
        ("[1, 2]", "[2, 1]", False),
        ("1", "1.0", True),
        ("true", "1", False),
        ('{"on": [true]}', '{"on": [1]}', False),
        ('{"a": null}', "{}", False),
        ("9007199254740993", "9007199254740992.0", False),
        (' {"a": 1}\n', '{"a": 1}', True),
        ('{"a": 1} done', '{"a": 1}', False),
        ('```json\n{"a": 1}\n```', '{"a": 1}', False),
        ('{"a": 2, "a": 1}', '{"a": 1}', False),
        ("NaN", "null", False),
        ("", "null", False),
        ("1e999", "1", False),
        ("[" * 100_000, "[]", False),
        ('"\\ud800"', '"x"', False),
    ],
)
def test_json_equality_is_that_of_values(answer, reference, equal):
    assert json_equal(answer, reference) is equal


def test_a_reference_that_is_no_json_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(ValueError, match=r"reference 'turn on' is not JSON.*metric=text"):
        json_equal("turn on", "turn on")


def test_text_ignores_only_white_space_around_it():
    assert text_equal(" yes\n", "yes")
    assert not text_equal("Yes", "yes")
    assert not text_equal("y es", "yes")
    assert sorted(ANSWER_METRICS) == ["choice", "json", "short", "text"]


@given(st.integers(0, 500), st.integers(0, 500), st.floats(0.5, 0.999))
def test_wilson_solves_its_defining_equation_and_holds_the_share(successes, failures, level):
    total = successes + failures
    low, high = wilson_interval(successes, total, level)
    assert 0 <= low <= high <= 1
    if total:
        share = successes / total
        assert low <= share <= high
        mirrored = wilson_interval(failures, total, level)
        assert math.isclose(low, 1 - mirrored[1], abs_tol=1e-12)
        # A bound p is where |share - p| equals z standard errors taken at p.
        errors = {abs(share - p) ** 2 / (p * (1 - p) / total) for p in (low, high) if 0 < p < 1}
        assert max(errors) - min(errors) < 1e-6 * max(errors)


def test_wilson_agrees_with_a_published_value():
    # Newcombe 1998, table I: 81 of 263.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == 1.0
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("arguments", [(3, 2), (-1, 2), (1, 2, 1.0), (1, 2, 0.0)])
def test_impossible_counts_are_refused(arguments):
    with pytest.raises(ValueError, match="must be between"):
        wilson_interval(*arguments)
