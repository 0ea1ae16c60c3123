"""Training that changed nothing or made it worse is said to have done so, wherever its figures are shown."""

from __future__ import annotations

import io
from typing import Any

import pytest

from moslora.display import Display
from moslora.evaluation.results import Measure, Report, show
from moslora.metrics.change import change_of, training_verdict
from moslora.reports.metric_rows import metric_rows, verdict_sentence
from moslora.training.summary import show_measurements

CASES = {
    "alpha 0": (5.554049, 5.554049, "nothing", "Training changed nothing: held-out loss 5.5540 → 5.5540"),
    "a warm-up that never ends": (5.55404915, 5.55404908, "nothing", "Training changed nothing"),
    "a rate of 1e3": (5.552, 5.557, "worse", "Training made it worse: held-out loss 5.5520 → 5.5570"),
    "as it should be": (5.552, 1.2, "better", "Held-out loss 5.5520 → 1.2000: better."),
    "a loss of 0": (0.0, 0.0, "nothing", "Training changed nothing"),
}


def measured(before: float, after: float, **shares: tuple[float, float]) -> dict[str, Any]:
    stages = {
        stage: {"loss": loss, **{name: both[number] for name, both in shares.items()}}
        for number, (stage, loss) in enumerate((("before", before), ("after", after)))
    }
    return {
        **stages,
        "intervals": {"before": {}, "after": {}},
        "examples": 60,
        "unit": "held-out examples",
        "answers": 0,
    }


@pytest.mark.parametrize("what", CASES)
def test_what_training_did_is_said_under_its_figures_and_in_the_report(what: str) -> None:
    before, after, change, sentence = CASES[what]
    record = measured(before, after)
    assert change_of(before, after) == change
    assert training_verdict(record["before"], record["after"], record["unit"])[0] == change
    show_measurements(record, Display(stream := io.StringIO()))
    assert sentence in stream.getvalue()
    page = verdict_sentence(metric_rows(record, []), 60, 0) or ""
    assert ("Tuning changed nothing." in page) == (change == "nothing")
    assert ("worse" in page) == (change == "worse")


def test_a_better_loss_does_not_hide_worse_answers() -> None:
    record = measured(2.0, 1.0, exact_match=(0.5, 0.25))
    sentence = training_verdict(record["before"], record["after"], record["unit"])[1]
    assert sentence.endswith("better. Exact match fell from 50.0% to 25.0%.")


def test_other_units_are_called_by_their_name() -> None:
    assert (
        "loss on training pictures 1.0000"
        in training_verdict({"loss": 1.0}, {"loss": 1.0}, "training pictures")[1]
    )


def test_evaluate_says_where_the_adapter_gained_nothing() -> None:
    def measure(name: str, base: float, tuned: float, low: float, high: float, **more: Any) -> Measure:
        return Measure(name, 9, base, tuned=tuned, difference=tuned - base, low=low, high=high, p=0.5, **more)

    shares: dict[str, Any] = {"base_interval": (0.1, 0.9), "tuned_interval": (0.1, 0.9)}
    measures = [
        measure("loss", 5.552, 5.557, 0.001, 0.009),
        measure("exact_match", 0.5, 0.6, -0.1, 0.3, **shares),
        measure("accuracy", 0.5, 0.5, 0, 0, **shares),
        measure("better", 0.1, 0.9, 0.7, 0.9, **shares),
    ]
    show(Report("base", "adapter", "data", None, measures, []), Display(stream := io.StringIO()))
    shown = stream.getvalue()
    assert "The adapter makes loss worse: 5.5520 → 5.5570." in shown
    assert "No difference in exact match could be shown: 50.0% → 60.0%, the 95 % interval holds 0." in shown
    assert "accuracy did not change: 50.0% → 50.0%." in shown and "better" not in shown.split("\n")[-2]
