from __future__ import annotations

import math
from typing import Any

import pytest

from moslora.comparison.verdict import Cell, foresee, judge

BASE = [2.0] * 4


def cell(method: str, rate: float, seed: int, validation: float, test: list[float], **more: Any) -> Cell:
    return Cell(method, rate, seed, "done", validation=[validation] * 4, test=test, seconds=1.0, **more)


def lost(method: str, rate: float, seed: int, status: Any = "diverged") -> Cell:
    return Cell(method, rate, seed, status, reason="it went wrong")


def flat(value: float) -> list[float]:
    return [value] * 4


def test_the_rate_is_chosen_by_validation_and_judged_on_the_held_out_examples():
    cells = []
    for seed in range(3):
        # At 0.1 validation is better, at 0.2 the held-out loss: only validation may choose.
        cells += [cell("lora", 0.1, seed, 0.5, flat(1.0)), cell("lora", 0.2, seed, 0.6, flat(0.1))]
        cells += [cell("other", 0.1, seed, 0.9, flat(0.2)), cell("other", 0.2, seed, 0.4, flat(0.8))]
    found = judge(cells, ["lora", "other"], "lora", BASE, BASE)
    assert [m.best_rate for m in found.methods] == [0.1, 0.2]
    assert [m.score for m in found.methods] == pytest.approx([1.0, 0.8])
    assert found.contrasts[0].difference.mean == pytest.approx(-0.2)


def test_a_verdict_is_what_a_calculation_by_hand_gives():
    lora = {0: 1.00, 1: 1.10, 2: 1.20}
    other = {0: 0.89, 1: 1.00, 2: 1.11}  # less by 0.11, 0.10, 0.09: mean -0.10, deviation 0.01
    cells = [cell("lora", 0.1, s, v, flat(v)) for s, v in lora.items()]
    cells += [cell("other", 0.1, s, v, flat(v)) for s, v in other.items()]
    found = judge(cells, ["lora", "other"], "lora", BASE, BASE)
    contrast = found.contrasts[0]
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert contrast.difference.mean == pytest.approx(-0.10)
    assert (contrast.difference.low, contrast.difference.high) == pytest.approx((-0.1 - half, -0.1 + half))
    assert contrast.found == "better"
    assert "other is better than lora" in found.sentences[0]
    # Student's t over three seeds, for the same examples.
    assert found.methods[0].interval == pytest.approx((1.1 - 0.24841, 1.1 + 0.24841), abs=1e-4)


def test_no_difference_is_an_answer_with_the_size_that_could_have_been_seen():
    lora, other = [1.0, 1.1, 1.2], [1.1, 1.0, 1.22]
    cells = [cell("lora", 0.1, s, v, flat(v)) for s, v in enumerate(lora)]
    cells += [cell("other", 0.1, s, v, flat(v)) for s, v in enumerate(other)]
    found = judge(cells, ["lora", "other"], "lora", BASE, BASE)
    contrast = found.contrasts[0]
    assert contrast.found == "none"
    # Differences 0.1, -0.1, 0.02: deviation 0.1007; (4.303 + 0.842)·0.1007/√3.
    assert contrast.detectable == pytest.approx((4.302653 + 0.841621) * 0.100664 / math.sqrt(3), rel=1e-3)
    assert f"you could have seen one of {contrast.detectable:.2g}" in found.sentences[0]


def test_the_same_method_twice_is_not_declared_different():
    cells = [
        cell(m, r, s, 1 + r + s, flat(1.0 + s)) for m in ("a", "b") for r in (0.1, 0.2) for s in range(3)
    ]
    found = judge(cells, ["a", "b"], "a", BASE, BASE)
    assert (found.contrasts[0].difference.mean, found.contrasts[0].p_corrected) == (0, 1)
    assert found.contrasts[0].found == "none"


def test_a_rate_at_which_a_seed_was_lost_is_not_chosen_and_shown():
    cells = [cell("lora", r, s, r, flat(1.0 + s / 10)) for r in (0.1, 0.2) for s in range(2)]
    cells += [cell("other", 0.2, s, 0.9, flat(1.0 + s / 10)) for s in range(2)]
    cells += [cell("other", 0.1, 0, 0.001, flat(0.001)), lost("other", 0.1, 1)]
    other = judge(cells, ["lora", "other"], "lora", BASE, BASE).methods[1]
    assert other.best_rate == 0.2 and other.diverged == 1
    assert [p.status for p in other.points] == ["done", "diverged", "done", "done"]


def test_a_method_without_a_whole_rate_has_no_result_and_the_others_are_judged():
    cells = [cell(m, 0.1, s, 1.0, flat(1.0 + s / 10)) for m in ("lora", "good") for s in range(2)]
    cells += [cell("bad", 0.1, 0, 0.1, flat(0.1)), lost("bad", 0.1, 1, "crashed")]
    found = judge(cells, ["lora", "good", "bad"], "lora", BASE, BASE)
    assert [c.method for c in found.contrasts] == ["good"]
    assert not found.complete and found.methods[2].score is None
    assert "bad has no result" in found.sentences[-1] and "1 crashed" in found.sentences[-1]


def test_without_a_baseline_nothing_is_compared():
    cells = [cell("good", 0.1, s, 1.0, flat(1.0)) for s in range(2)]
    cells += [lost("lora", 0.1, s, "crashed") for s in range(2)]
    found = judge(cells, ["lora", "good"], "lora", BASE, BASE)
    assert not found.contrasts
    assert any("nothing can be compared" in sentence for sentence in found.sentences)


def test_the_stable_range_is_unbroken_and_keeps_most_of_the_improvement():
    # The base stands at 2, the best at 1: at most 1.1 belongs, and what a lost seed cuts off does not.
    losses = {0.1: 1.05, 0.2: 1.5, 0.4: 1.08, 0.8: 1.0, 1.6: 1.09}
    cells = [cell(m, r, s, v, flat(v)) for m in ("a", "b") for r, v in losses.items() for s in range(2)]
    cells += [lost("a", 3.2, 0), cell("a", 3.2, 1, 1.0, flat(1.0))]
    cells += [cell("b", 3.2, s, 1.1 - 1e-9, flat(1.0)) for s in range(2)]
    a, b = judge(cells, ["a", "b"], "a", BASE, BASE).methods
    assert a.stable == (0.4, 1.6)
    assert b.stable == (0.4, 3.2)


def test_several_tests_are_corrected_for():
    def method(name: str, gaps: list[float]) -> list[Cell]:
        return [cell(name, 0.1, s, 1.0, flat(1.0 + s / 10 + gap)) for s, gap in enumerate(gaps)]

    cells = method("lora", [0, 0, 0]) + method("one", [-0.09, -0.07, -0.05]) + method("two", [0.1, -0.1, 0.0])
    alone = judge(cells[:6], ["lora", "one"], "lora", BASE, BASE).contrasts[0]
    together = judge(cells, ["lora", "one", "two"], "lora", BASE, BASE).contrasts[0]
    assert alone.difference.p == together.difference.p
    assert together.p_corrected == pytest.approx(2 * alone.p_corrected)
    assert together.detectable > alone.detectable
    assert alone.found == "better" and together.found == "none"
    assert "by chance" in judge(cells, ["lora", "one", "two"], "lora", BASE, BASE).sentences[0]


def test_cautions_name_edges_of_the_grid_and_methods_that_learned_nothing():
    cells = [cell(m, r, s, 3 - r, flat(3.0)) for m in ("a", "b") for r in (0.1, 0.2) for s in range(2)]
    text = " ".join(judge(cells, ["a", "b"], "a", BASE, BASE).cautions)
    assert "a was best at the highest rate tried, 0.2" in text
    assert "did not improve on the untrained base" in text
    assert "Two seeds say little" in text


def test_exact_match_is_compared_in_pairs_where_there_is_one():
    cells = []
    for seed in range(3):
        cells.append(cell("lora", 0.1, seed, 1.0, flat(1.0), correct=[True, False, False, False]))
        cells.append(cell("other", 0.1, seed, 1.0, flat(1.0), correct=[True, True, False, True]))
    found = judge(cells, ["lora", "other"], "lora", BASE, BASE)
    assert [c.measure for c in found.contrasts] == ["loss", "exact_match"]
    assert found.contrasts[1].difference.mean == pytest.approx(0.5)
    assert found.methods[1].exact_match == pytest.approx(0.75)


def test_missing_cells_are_refused():
    cells = [cell(m, 0.1, s, 1.0, flat(1.0)) for m in ("a", "b") for s in range(2)]
    with pytest.raises(ValueError, match="not one for every"):
        judge(cells[:-1], ["a", "b"], "a", BASE, BASE)
    with pytest.raises(ValueError, match="there twice"):
        judge([*cells, cells[0]], ["a", "b"], "a", BASE, BASE)


def test_what_could_be_seen_is_foreseen_from_seeds_of_one_method():
    cells = [cell("lora", 0.1, s, 1.0, flat(v)) for s, v in enumerate((1.0, 1.1, 1.2))]
    # No spread between examples; seeds deviate by 0.1, their differences by √2 times that.
    expected = (4.302653 + 0.841621) * math.sqrt(2) * 0.1 / math.sqrt(3)
    assert foresee(cells, 3, 1) == pytest.approx(expected, rel=1e-3)
    assert foresee(cells[:1], 3, 1) is None
