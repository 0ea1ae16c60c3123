"""EleutherAI's tasks on base and adapted model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.display import Display
from moslora.errors import ProofError
from moslora.evaluation.active import PROBES, as_inputs, prove_active, with_adapter
from moslora.evaluation.judge import Subject, load_judge
from moslora.evaluation.own_data import compare_shares
from moslora.evaluation.results import Activity, Measure, Report
from moslora.metrics.intervals import paired_examples

if TYPE_CHECKING:
    from moslora.evaluation.lm_eval_harness import TaskScores


def evaluate_lm_eval(
    subject: Subject, display: Display, adapter: Path | None, tasks: Sequence[str], limit: int | None
) -> Report:
    """Run EleutherAI's tasks on the base and on the adapted model."""
    from moslora.evaluation.lm_eval_harness import Harness

    harness = Harness(tasks, limit)
    judge, base = load_judge(subject, display)
    before = harness.run(base, judge.tokenizer)
    after, activity = None, None
    if adapter is not None:
        adapted = with_adapter(base, adapter)
        prompts = [text for task in before for text in task.prompts() if text][:PROBES]
        probes = [judge.tokenizer(text, verbose=False)["input_ids"] for text in prompts or ["The"]]
        activity = prove_active(adapted, adapter, as_inputs(probes), judge.device)
        after = harness.run(adapted, judge.tokenizer)
        _check_felt(before, after, adapter, activity)
    measures, lines = [], []
    for index, task in enumerate(before):
        tuned = None if after is None else after[index]
        for metric in task.metrics:
            measures.append(_of_harness(task, tuned, metric))
        lines += _items(task, tuned)
    return Report(
        subject.name, None if adapter is None else str(adapter), "lm-eval", activity, measures, lines
    )


def _check_felt(
    before: Sequence[TaskScores], after: Sequence[TaskScores], adapter: Path, activity: Activity
) -> None:
    """Fail if the harness got the very same likelihoods with the adapter as without, though it moves logits.

    Raises:
        ProofError: Then.
    """
    one, other = [task.outputs() for task in before], [task.outputs() for task in after]
    if activity.effect > 0 and one == other and _has_number(one):
        raise ProofError(
            f"lm-eval's likelihoods are the same with {adapter} as without, though it changes logits by "
            f"{activity.effect:.3g}: the adapter was not applied in the evaluation."
        )


def _has_number(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_number, value))
    return isinstance(value, float)


def _of_harness(task: TaskScores, tuned: TaskScores | None, metric: str) -> Measure:
    """Compare one metric, paired over items where it has a value for each."""
    name = f"{task.name} {metric.removesuffix(',none')}"
    one, other = task.per_item(metric), None if tuned is None else tuned.per_item(metric)
    shares = all(
        values is not None and set(values) <= {0.0, 1.0} for values in (one, other if tuned else one)
    )
    if one is not None and shares:
        return compare_shares(name, [v == 1 for v in one], None if other is None else [v == 1 for v in other])
    measure = Measure(name, len(task.items(metric)), task.metrics[metric])
    if tuned is None:
        return measure
    differences = [] if one is None or other is None else [b - a for a, b in zip(one, other, strict=True)]
    found = paired_examples(differences) if len(differences) > 1 else None
    return dataclasses.replace(
        measure,
        tuned=tuned.metrics[metric],
        difference=tuned.metrics[metric] - task.metrics[metric],
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        p=None if found is None else found.p,
    )


def _items(task: TaskScores, tuned: TaskScores | None) -> list[dict[str, Any]]:
    def right(scores: TaskScores | None, index: int) -> bool | None:
        value = (
            None
            if scores is None
            else scores.samples[index].get("acc", scores.samples[index].get("exact_match"))
        )
        return bool(value) if value in (0, 1) else None

    answers = task.answers()
    others = None if tuned is None else tuned.answers()
    return [
        {
            "place": f"{task.name}:{sample['doc_id']}",
            "filter": sample["filter"],
            "prompt": prompt,
            "reference": answers[index][0],
            "base": answers[index][1],
            "base_ok": right(task, index),
            "tuned": None if others is None else others[index][1],
            "tuned_ok": right(tuned, index),
        }
        for index, (sample, prompt) in enumerate(zip(task.samples, task.prompts(), strict=True))
    ]
