"""Loss and answers on the user's own examples."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moslora.adapters.formats.directory import read_config
from moslora.display import Display
from moslora.errors import UsageError
from moslora.evaluation.active import prove_active, with_adapter
from moslora.evaluation.judge import Subject
from moslora.evaluation.own_pictures import evaluate_own_pictures
from moslora.evaluation.results import Measure, Report
from moslora.metrics.answers import wilson_interval
from moslora.metrics.intervals import paired_examples
from moslora.recipe.schema import ImageRecipe, Recipe

if TYPE_CHECKING:
    from moslora.tasks.language import AnswerMetric, LanguageTask
    from moslora.tasks.task import Answer
    from moslora.tasks.text.cost import Costs


def evaluate_own_data(
    subject: Subject,
    display: Display,
    adapter: Path | None,
    wanted: Recipe,
    limit: int | None,
    metrics: Mapping[str, AnswerMetric],
) -> Report:
    """Measure loss and answers on the user's own examples, for base and adapted model."""
    from moslora.tasks import find_task
    from moslora.tasks.language import LanguageTask, question_of
    from moslora.tasks.text.cost import keep_changed

    if isinstance(wanted, ImageRecipe):
        return evaluate_own_pictures(subject, display, adapter, wanted, limit, metrics, _loss)
    kind = find_task(wanted.task.kind)
    if not issubclass(kind, LanguageTask):
        raise UsageError(f"task.kind={wanted.task.kind} cannot be evaluated here.")
    quiet = display if display.quiet else Display(display.stream, quiet=True)
    task = kind(wanted, quiet, lambda: None)
    task.measures_only = True
    task.base_model.handed_over, task.answer_metrics = subject.model, metrics
    task.also_limit = limit
    if adapter is not None:
        task.take_adapter(adapter)
    task.read()
    if limit is not None:
        every = len(task.heldout_examples)
        count = min(limit, every)
        task.heldout_examples = [task.heldout_examples[i * every // count] for i in range(count)]
    task.prepare()
    task.display = display
    base = task.load()
    judges = task.judges

    def measured(of: Any, label: str) -> tuple[list[float], list[Any], list[Any]]:
        losses = task.score(of, task.heldout_set, label)
        answers = task.ask(of, task.asked, label) if len(task.asked) else []
        return losses, answers, task.ask_shuffled(of, label) if answers and judges else []

    losses, answers, shuffled = measured(base, "base")
    own_shares = [task.shares(base, "base")]
    tuned_losses: list[float] | None = None
    tuned_answers: list[Any] = []
    tuned_shuffled: list[Any] = []
    activity = None
    costs: dict[str, Costs] = {}
    if adapter is None:
        costs = task.measure_also(base, tuned=False)
    else:
        config = read_config(adapter) if (adapter / "adapter_config.json").is_file() else {}
        changed = keep_changed(base, SimpleNamespace(**config)) if task.also else ()
        adapted = with_adapter(base, adapter)
        activity = prove_active(adapted, adapter, task.probe(), task.device)
        tuned_losses, tuned_answers, tuned_shuffled = measured(adapted, "tuned")
        costs = task.measure_also(adapted, changed)
        own_shares.append(task.shares(adapted, "tuned"))
    measures = [_loss(losses, tuned_losses)]
    shares = {task.accuracy_name: (answers, tuned_answers)}
    shares |= {f"{task.accuracy_name}_shuffled_images": (shuffled, tuned_shuffled)} if shuffled else {}
    if answers and judges:
        for name, (before, after) in shares.items():
            right = [[bool(a.correct) for a in of] for of in (before, after)]
            measures.append(compare_shares(name, right[0], right[1] if adapter is not None else None))
    for name, marks in own_shares[0].items():
        measures.append(compare_shares(name, marks, own_shares[1].get(name) if adapter is not None else None))
    measures += _compared(task, answers, tuned_answers)
    for name, metric in metrics.items() if answers else ():
        before, after = (_judged(metric, of) for of in (answers, tuned_answers))
        measures.append(_compare(name, before, after if adapter is not None else None))
    measures += [measure for also in task.also for measure in _of_cost(also.name, costs[also.name])]
    asked, strange = (
        {a.place: (a, b) for a, b in itertools.zip_longest(one, two)}
        for one, two in ((answers, tuned_answers), (shuffled, tuned_shuffled))
    )
    lines = []
    for index, encoded in enumerate(task.heldout_set):
        was, now = asked.get(encoded.place, (None, None))
        line = {
            "place": encoded.place,
            "prompt": question_of(task.by_place[encoded.place]),
            "reference": encoded.answer,
            "base_loss": losses[index],
            "tuned_loss": None if tuned_losses is None else tuned_losses[index],
            "base": None if was is None else was.text,
            "tuned": None if now is None else now.text,
            "base_ok": None if was is None else was.correct,
            "tuned_ok": None if now is None else now.correct,
        }
        pictures = task.pictures_of(task.by_place[encoded.place])
        if pictures:
            line["pictures"] = pictures
        if encoded.place in strange:
            was, now = strange[encoded.place]
            line["other_pictures"] = list(was.pictures)
            line |= {
                "base_shuffled": was.text,
                "tuned_shuffled": None if now is None else now.text,
                "base_shuffled_ok": was.correct,
                "tuned_shuffled_ok": None if now is None else now.correct,
            }
        lines.append(line)
    return Report(subject.name, None if adapter is None else str(adapter), "data", activity, measures, lines)


def _of_cost(name: str, costs: Costs) -> list[Measure]:
    """Return loss and KL from the base on data that the adapter is not about, as means over tokens."""
    from moslora.tasks.also import per_token

    base, tuned, kl = (per_token(sums, costs.tokens) for sums in (costs.base, costs.tuned, costs.kl))
    loss = dataclasses.replace(_loss(base, tuned if tuned else None), name=f"loss_{name}")
    apart = [dataclasses.replace(_loss([0.0] * len(kl), kl), name=f"kl_{name}")] if kl else []
    return [loss, *apart]


def _compared(task: LanguageTask, base: Sequence[Answer], tuned: Sequence[Answer]) -> list[Measure]:
    """Return metrics that are no means over answers, as F1 and correlations."""
    found = task.compare_answers(base, tuned or base) if base else {}
    measures = []
    for name, of in found.items():
        measure = Measure(name, len(base), of.base, of.base_interval)
        if tuned:
            measure = dataclasses.replace(
                measure,
                tuned=of.tuned,
                tuned_interval=of.tuned_interval,
                difference=of.difference,
                low=of.low,
                high=of.high,
            )
        measures.append(measure)
    return measures


def _judged(metric: AnswerMetric, answers: Sequence[Answer]) -> list[bool | float]:
    return [metric(answer.text, answer.reference) for answer in answers]


def _compare(name: str, base: Sequence[float], tuned: Sequence[float] | None) -> Measure:
    """Compare a metric of the caller's: shares if it says right or wrong, else means."""
    if all(isinstance(value, bool) for value in (*base, *(tuned or ()))):
        return compare_shares(name, list(map(bool, base)), None if tuned is None else list(map(bool, tuned)))
    base = list(map(float, base))
    return dataclasses.replace(_loss(base, None if tuned is None else list(map(float, tuned))), name=name)


def _loss(base: Sequence[float], tuned: Sequence[float] | None) -> Measure:
    if tuned is None:
        return Measure("loss", len(base), fmean(base))
    differences = [b - a for a, b in zip(base, tuned, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise UsageError(
            "A held-out loss is NaN or infinite: the adapter or the base is broken (moslora doctor)."
        )
    found = paired_examples(differences) if len(differences) > 1 else None
    return Measure(
        "loss",
        len(base),
        fmean(base),
        tuned=fmean(tuned),
        difference=fmean(differences),
        low=None if found is None else found.low,
        high=None if found is None else found.high,
        p=None if found is None else found.p,
    )


def compare_shares(name: str, base: Sequence[bool], tuned: Sequence[bool] | None, **more: Any) -> Measure:
    """Compare shares of right items; p is McNemar's exact one, as the report of a run has it."""
    from moslora.reports.metric_rows import sign_test

    measure = Measure(name, len(base), fmean(base), wilson_interval(sum(base), len(base)), **more)
    if tuned is None:
        return measure
    fixed = sum(b and not a for a, b in zip(base, tuned, strict=True))
    broken = sum(a and not b for a, b in zip(base, tuned, strict=True))
    differences = [float(b) - float(a) for a, b in zip(base, tuned, strict=True)]
    found = paired_examples(differences) if len(differences) > 1 else None
    return dataclasses.replace(
        measure,
        tuned=fmean(tuned),
        tuned_interval=wilson_interval(sum(tuned), len(tuned)),
        difference=fmean(differences),
        low=None if found is None else max(-1.0, found.low),
        high=None if found is None else min(1.0, found.high),
        p=sign_test(fixed, broken) if fixed + broken else 1.0,
        fixed=fixed,
        broken=broken,
    )
