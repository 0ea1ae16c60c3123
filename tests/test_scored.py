"""Metrics of labels, against sums written out by hand, and their intervals."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moslora.metrics.change import baseline_sentence
from moslora.metrics.margins import PairScores, reliability
from moslora.metrics.resampling import compare_scores, measure_scores
from moslora.metrics.scored import ClassScores, LabelSetScores, TagScores, ValueScores, entities

CLASSES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=30)


def measured(scores: object) -> dict[str, float]:
    ones = np.ones((1, scores.examples))  # type: ignore[attr-defined]
    return {name: float(value[0]) for name, value in scores.measure(ones).items()}  # type: ignore[attr-defined]


def f1(pairs: list[tuple[int, int]], index: int) -> float:
    both = sum(pair == (index, index) for pair in pairs)
    wrong = sum((a == index) != (b == index) for a, b in pairs)
    return 2 * both / (2 * both + wrong) if both + wrong else 0.0


@given(CLASSES)
def test_metrics_of_classes_are_the_sums_written_out(pairs: list[tuple[int, int]]) -> None:
    found = measured(ClassScores([a for a, _ in pairs], [b for _, b in pairs], 3, 1))
    assert found["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))
    assert found["f1"] == pytest.approx(f1(pairs, 1))
    seen = {label for pair in pairs for label in pair}
    assert found["f1_macro"] == pytest.approx(sum(f1(pairs, label) for label in seen) / len(seen))
    # Matthews' correlation is Pearson's of the indicators of all classes, centered class by class.
    one, two = (np.eye(3)[[pair[side] for pair in pairs]] for side in (0, 1))
    one, two = one - one.mean(axis=0), two - two.mean(axis=0)
    spread = math.sqrt(float((one**2).sum() * (two**2).sum()))
    assert found["mcc"] == pytest.approx(
        float((one * two).sum()) / spread if spread > 1e-12 else 0.0, abs=1e-9
    )


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=25))
def test_correlations_are_those_of_numpy_and_of_mean_ranks(pairs: list[tuple[float, float]]) -> None:
    one, two = ([round(pair[side], 1) for pair in pairs] for side in (0, 1))
    found = measured(ValueScores(one, two))

    def ranks(values: list[float]) -> list[float]:
        return [sum(v < x for v in values) + (1 + sum(v == x for v in values)) / 2 for x in values]

    for name, (a, b) in {"pearson": (one, two), "spearman": (ranks(one), ranks(two))}.items():
        constant = len(set(a)) == 1 or len(set(b)) == 1
        expected = 0.0 if constant else float(np.corrcoef(a, b)[0, 1])
        assert found[name] == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_counts_of_examples_are_copies_of_them(seed: int) -> None:
    """What the bootstrap relies on: an example that counts twice is two examples."""
    draw = random.Random(seed)
    size = draw.randint(2, 9)
    counts = [*(draw.randint(0, 3) for _ in range(size - 1)), 1]
    copies = [index for index, count in enumerate(counts) for _ in range(count)]
    truth, predicted = ([draw.uniform(-1, 1) for _ in range(size)] for _ in range(2))
    labels, said = ([draw.randrange(3) for _ in range(size)] for _ in range(2))
    whole = [ValueScores(truth, predicted), ClassScores(labels, said, 3, 0), PairScores(truth)]
    parts = [
        ValueScores([truth[i] for i in copies], [predicted[i] for i in copies]),
        ClassScores([labels[i] for i in copies], [said[i] for i in copies], 3, 0),
        PairScores([truth[i] for i in copies]),
    ]
    for one, two in zip(whole, parts, strict=True):
        found = {name: float(v[0]) for name, v in one.measure(np.array([counts], dtype=float)).items()}
        assert found == pytest.approx(measured(two), abs=1e-9)


def test_spans_are_counted_as_conll_does() -> None:
    names = ["O", "B-x", "I-x", "B-y", "I-y"]
    truth = [[1, 2, 0, 3], [0, 1, 1]]
    said = [[1, 2, 0, 1], [0, 1, 2]]
    found = measured(TagScores(truth, said, names))
    assert found["entity_precision"] == pytest.approx(1 / 3)  # x 0-2 of x 0-2, x 3-4, x 1-3
    assert found["entity_recall"] == pytest.approx(1 / 4)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert entities(["I-x", "I-y"]) == {("x", 0, 1), ("y", 1, 2)}
    assert "entity_f1" not in measured(TagScores([[0]], [[1]], ["NOUN", "VERB"]))


def test_sets_of_labels_are_right_as_wholes() -> None:
    found = measured(LabelSetScores([[1, 0], [1, 1], [0, 0]], [[1, 0], [1, 0], [0, 1]]))
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["f1_macro"] == pytest.approx((1 + 0) / 2)


def test_rewards_that_mean_what_they_say_are_calibrated() -> None:
    draw = random.Random(0)
    honest, loud = [], []
    for _ in range(4000):
        margin = abs(draw.gauss(0, 1.5))
        right = draw.random() < 1 / (1 + math.exp(-margin))
        honest.append(margin if right else -margin)
        loud.append(4 * margin if right else -4 * margin)
    assert (
        measured(PairScores(honest))["calibration_error"]
        < 0.03
        < measured(PairScores(loud))["calibration_error"]
    )
    rows = reliability(honest)
    assert sum(count for _, _, count, _, _ in rows) == 4000
    assert all(low <= sure <= high + 1e-9 for low, high, _, sure, _ in rows)


def test_intervals_of_a_correlation_hold_the_truth_as_often_as_they_say() -> None:
    """Of 60 samples of 80 pairs with correlation 0.6 at least 51 intervals hold it; fewer have p below 0.01."""
    held = 0
    generator = np.random.default_rng(0)
    for _ in range(60):
        one = generator.normal(size=80)
        two = 0.6 * one + 0.8 * generator.normal(size=80)
        _, intervals = measure_scores(ValueScores(one.tolist(), two.tolist()))
        low, high = intervals["pearson"]
        held += low <= 0.6 <= high
    assert held >= 51
    assert NormalDist().cdf((51 - 57) / math.sqrt(57 * 0.05)) < 0.01


def test_a_metric_that_no_draw_changes_has_no_interval_but_a_share_has_wilsons() -> None:
    values, intervals = measure_scores(ClassScores([0, 1] * 10, [0, 1] * 10, 2, 1))
    assert values["mcc"] == 1 and "mcc" not in intervals
    low, high = intervals["accuracy"]
    assert 0.8 < low < 1 and high == 1


def test_two_models_are_compared_on_the_same_draws() -> None:
    truth = [index % 2 for index in range(40)]
    base = [0] * 40
    tuned = [label if index % 5 else 1 - label for index, label in enumerate(truth)]
    found = compare_scores(ClassScores(truth, base, 2, 1), ClassScores(truth, tuned, 2, 1))
    assert found["accuracy"].difference == pytest.approx(0.3)
    assert found["accuracy"].low < 0.3 < found["accuracy"].high
    same = compare_scores(ClassScores(truth, tuned, 2, 1), ClassScores(truth, tuned, 2, 1))
    assert (same["mcc"].low, same["mcc"].difference, same["mcc"].high) == (0, 0, 0)


@pytest.mark.parametrize(
    ("ends", "said"),
    [((0.65, 0.7), "Better than"), ((0.6, 0.7), "No gain over"), ((0.5, 0.6), "Worse than")],
)
def test_a_model_that_beats_no_model_is_told_from_one_that_does_not(
    ends: tuple[float, float], said: str
) -> None:
    measured = {
        "after": {"loss": 0.6, "accuracy": sum(ends) / 2},
        "baseline": {"loss": 0.7, "accuracy": 0.634},
        "intervals": {"after": {"accuracy": ends}},
    }
    sentence = baseline_sentence(measured)
    assert sentence is not None and sentence.startswith(said) and "63.4%" in sentence
    assert baseline_sentence({"after": {"loss": 0.6}}) is None
