"""What a run measured, as rows of a table and one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moslora.metrics.answers import wilson_interval
from moslora.metrics.change import change_of, price_sentence
from moslora.reports.formatting import UNIT, number, percent, section_of
from moslora.tasks.image.fidelity import SCORES
from moslora.wording import figure

__all__ = ["sign_test"]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: as a share of the examples or as a number, and which way is up."""

    label: str
    form: Literal["number", "share"] = "number"
    better: Literal["higher", "lower", "unknown"] = "unknown"


METRICS = {
    "loss": Metric("Held-out loss", "number", "lower"),
    "perplexity": Metric("Perplexity", "number", "lower"),
    "exact_match": Metric("Exact match", "share", "higher"),
    "accuracy": Metric("Accuracy", "share", "higher"),
    "accuracy_shuffled_images": Metric("Accuracy with images shuffled", "share", "unknown"),
    "reward_accuracy": Metric("Preferred answer has the higher reward", "share", "higher"),
    "reward_margin": Metric("Margin between the rewards", "number", "higher"),
    "prefers_chosen": Metric("Preferred answer is more probable", "share", "higher"),
    "chosen_logp": Metric("Log-probability of preferred answers, nats", "number"),
    "rejected_logp": Metric("Log-probability of rejected answers, nats", "number"),
    "kl": Metric("KL from the reference, nats a token", "number"),
    "answer_tokens": Metric("Tokens of a generated answer", "number"),
    "valid_json": Metric("Valid JSON", "share", "higher"),
    "f1": Metric("F1", "share", "higher"),
    "f1_macro": Metric("F1, mean of classes", "share", "higher"),
    "f1_micro": Metric("F1, all labels together", "share", "higher"),
    "entity_f1": Metric("F1 of spans", "share", "higher"),
    "entity_precision": Metric("Precision of spans", "share", "higher"),
    "entity_recall": Metric("Recall of spans", "share", "higher"),
    "mcc": Metric("Matthews correlation", "number", "higher"),
    "pearson": Metric("Pearson correlation", "number", "higher"),
    "spearman": Metric("Spearman correlation", "number", "higher"),
    "margin": Metric("Mean margin", "number", "higher"),
    "calibration_error": Metric("Expected calibration error", "number", "lower"),
}
# How an answer changed, with how many examples are shown. The mistakes come right after the successes.
CHANGES = {
    (False, True): ("Fixed by tuning", 4),
    (True, False): ("Broken by tuning", 4),
    (False, False): ("Still wrong", 4),
    (True, True): ("Right before and after", 2),
}


def sign_test(fixed: int, broken: int) -> float:
    """Return the two-sided p-value of ``fixed`` against ``broken`` (McNemar's exact test).

    Examples that were right or wrong both times carry no information about a change and are not counted.

    Args:
        fixed: Examples that went from wrong to right.
        broken: Examples that went from right to wrong.

    Returns:
        Probability, in (0, 1], of a split at least this uneven if both were equally likely.

    Example:
        >>> sign_test(5, 1)
        0.21875
    """
    changed = fixed + broken
    tail = sum(math.comb(changed, k) for k in range(min(fixed, broken) + 1))
    return min(1.0, float(2 * tail / 2**changed))


def metric_rows(metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    before, after = section_of(metrics, "before"), section_of(metrics, "after")
    intervals = section_of(metrics, "intervals")
    rows = []
    for key in {**before, **after}:
        metric = METRICS.get(key, Metric(key.replace("_", " ").capitalize()))
        values = {"before": number(before.get(key)), "after": number(after.get(key))}
        label = metric.label
        unit = str(metrics.get("unit") or UNIT)
        if key == "loss" and not unit.startswith("held-out"):
            label = f"Loss on {unit}"
        row: dict[str, Any] = {"key": key, "label": label, "form": metric.form, "change": None}
        without = number(section_of(metrics, "baseline").get(key))
        row["baseline"] = None if without is None else _shown(without, metric)
        for phase, value in values.items():
            given = section_of(intervals, phase).get(key)
            interval = given if given else _counted_interval(value, phase, metric, predictions)
            row[phase] = _shown(value, metric)
            row[f"{phase}_interval"] = _shown_interval(interval, metric) if interval else None
        if values["before"] is not None and values["after"] is not None:
            difference = values["after"] - values["before"]
            sign = "+" if difference > 0 else "−" if difference < 0 else "±"
            size = abs(difference)
            row["change"] = sign + (f"{percent(size)} points" if metric.form == "share" else figure(size))
            improved = difference > 0 if metric.better == "higher" else difference < 0
            judged = metric.better != "unknown" and difference != 0
            row["direction"] = ("better" if improved else "worse") if judged else ""
            row["stands"] = change_of(values["before"], values["after"]) == "nothing"
        rows.append(row)
    return rows


def _counted_interval(
    value: float | None, phase: str, metric: Metric, predictions: Sequence[Mapping[str, Any]]
) -> tuple[float, float] | None:
    """Return the interval of a share that the right-or-wrong marks of the predictions add up to."""
    marks = _marks(predictions, "base_ok" if phase == "before" else "tuned_ok")
    if value is None or metric.form != "share" or not marks:
        return None
    return wilson_interval(sum(marks), len(marks)) if abs(sum(marks) / len(marks) - value) < 1e-9 else None


def _marks(predictions: Sequence[Mapping[str, Any]], key: str) -> list[bool]:
    return [mark for line in predictions if isinstance(mark := line.get(key), bool)]


def cost_rows(also: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what tuning cost on each set of other data, ready for the page."""
    sets = []
    for name, cost in also.items():
        rows = []
        for key, label in (("loss", f"Loss on {name} text"), ("kl", "KL from the base")):
            before, after = (number(section_of(cost, stage).get(key)) for stage in ("before", "after"))
            change = section_of(section_of(cost, "change"), key)
            ends = [number(change.get(end)) for end in ("low", "high")]
            rows.append(
                {
                    "label": label,
                    "before": "—" if before is None else f"{before:.4f}",
                    "after": "—" if after is None else f"{after:.4f}",
                    "change": "—" if before is None or after is None else _signed(after - before),
                    "interval": None if None in ends else " to ".join(_signed(end) for end in ends),
                }
            )
        kinds = [
            {"kind": kind, "count": of.get("passages"), **{key: _plain(of.get(key)) for key in COST_COLUMNS}}
            for kind, of in section_of(cost, "kinds").items()
        ]
        about = {"source": cost.get("source"), "passages": cost.get("passages"), "tokens": cost.get("tokens")}
        sets.append({"name": name, "rows": rows, "kinds": kinds, "said": price_sentence(name, cost), **about})
    return sets


COST_COLUMNS = ("base", "tuned", "kl")


def _plain(value: Any) -> str:
    known = number(value)
    return "—" if known is None else f"{known:.4f}"


def _signed(value: float | None) -> str:
    return "—" if value is None else f"{value:+.4f}".replace("-", "−")


def fidelity_rows(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return scores of pictures, base and tuned side by side, with what they are means of; and what is absent."""
    before, after, change = (section_of(found, stage) for stage in ("before", "after", "change"))
    rows, tables = [], []
    for name, score in SCORES.items():
        one, two, moved = (section_of(stage, name) for stage in (before, after, change))
        about = one or two
        if not about:
            continue
        count = len(about.get("prompts", ()))
        real = len(about.get("real", ()))
        rows.append(
            {
                "name": name,
                "base": _cosine(one.get("mean"), one.get("interval")),
                "tuned": _cosine(two.get("mean"), two.get("interval")),
                "change": _cosine(moved.get("mean"), moved.get("interval"), signed=True),
                "of": f"{about.get('pictures')} pictures of {count} prompts"
                + (f", each with {real} real ones" if real else ", each with its prompt"),
                "model": f"{about.get('title')}, {about.get('model')}",
                "published": None if about.get("title") == score.published else score.published,
            }
        )
        for key, field, title in (("prompts", "prompt", "by prompt"), ("real", "picture", "by real picture")):
            tuned = {line[field]: line["mean"] for line in two.get(key, ())}
            lines = [
                (line[field], _cosine(line["mean"])[0], _cosine(tuned.get(line[field]))[0])
                for line in one.get(key, ())
            ]
            if lines:
                tables.append({"title": f"{name} {title}", "lines": lines})
    return {
        "rows": rows,
        "tables": tables,
        "absent": section_of(after, "absent") or section_of(before, "absent"),
    }


def _cosine(value: Any, interval: Any = None, signed: bool = False) -> tuple[str, str | None]:
    """Show a cosine, or a difference of two, with its interval."""
    cosine = number(value)
    if cosine is None:
        return "—", None
    form = "{:+.3f}" if signed else "{:.3f}"
    ends = " to ".join(form.format(end) for end in interval) if interval else None
    return form.format(cosine).replace("-", "−"), ends.replace("-", "−") if ends else None


def verdict_sentence(
    rows: Sequence[Mapping[str, Any]], count: int, answered: int, unit: str = UNIT
) -> str | None:
    """Say in one sentence what tuning did: the loss first, then the first share."""
    said = [row for row in rows if row["key"] == "loss"] + [row for row in rows if row["form"] == "share"][:1]
    parts: list[str] = []
    for row in said or rows[:1]:
        interval = f" (95\u00a0% interval {row['after_interval']})" if row["after_interval"] else ""
        course = (
            f"{row['before']} → {row['after']}{interval}"
            if row["change"]
            else f"{row['before']} before tuning"
        )
        parts.append(f"{row['label'].lower() if parts else row['label']} {course}")
    if not parts:
        return None
    some = f", {answered} of which were answered" if 0 < answered < count else ""
    where = f" on {count} {unit}{some}" if count and unit.startswith("held-out") else ""
    worse = [row["label"].lower() for row in said if row.get("direction") == "worse"]
    also = f" Tuning made the {' and the '.join(worse)} worse." if worse else ""
    if said and all(row.get("stands") for row in said):
        also = " Tuning changed nothing."
    if all(row["after"] == "—" for row in rows):
        also = " Nothing was measured after it."
    return f"{'; '.join(parts)}{where}.{also}"


def chance_sentence(predictions: Sequence[Mapping[str, Any]]) -> str | None:
    """Say how many single answers changed, and whether that could be chance."""
    pairs = [(line.get("base_ok"), line.get("tuned_ok")) for line in predictions]
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    if not any(isinstance(base, bool) and isinstance(tuned, bool) for base, tuned in pairs):
        return None
    if not fixed + broken:
        return "Tuning turned no answer from wrong to right or back."
    p = sign_test(fixed, broken)
    judged = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    close = f"Chance alone would often do that: no difference shown ({judged})."
    clear = f"Chance alone would rarely do that ({judged}, exact sign test)."
    return f"Tuning fixed {fixed} answers and broke {broken}. {close if p >= 0.05 else clear}"


def kind_rows(predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for line in predictions:
        if line.get("kind") is not None:
            kinds.setdefault(str(line["kind"]), []).append(line)
    rows = []
    for kind, lines in kinds.items():
        row: dict[str, Any] = {"kind": kind, "count": len(lines)}
        for phase, key in (("before", "base_ok"), ("after", "tuned_ok")):
            marks = _marks(lines, key)
            row[phase] = _shown(sum(marks) / len(marks), _SHARE) if marks else "—"
            row[f"{phase}_interval"] = (
                _shown_interval(wilson_interval(sum(marks), len(marks)), _SHARE) if marks else None
            )
            row[f"{phase}_share"] = sum(marks) / len(marks) if marks else None
        rows.append(row)
    return rows


_SHARE = Metric("", "share", "higher")


def _shown(value: float | None, metric: Metric) -> str:
    if value is None:
        return "—"
    if metric.form == "share":
        return f"{percent(value)}\u00a0%"
    return ("−" if value < 0 else "") + figure(abs(value))


def _shown_interval(interval: Sequence[float], metric: Metric) -> str:
    low, high = interval  # U+2060 keeps a line from ending between the two
    if metric.form == "number":
        return f"{figure(low)}–\u2060{figure(high)}"
    if high - low < 0.05:
        return f"{percent(low)}–\u2060{percent(high)}\u00a0%"
    return f"{100 * low:.0f}–\u2060{100 * high:.0f}\u00a0%"


def tables_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tables of a run's record, the tuned model's first, with how dark each cell is.

    Args:
        found: ``tables`` of ``run.json``: a list for each stage.
    """
    shown = []
    for stage, who in (("after", "tuned model"), ("before", "base")):
        tables = found.get(stage)
        for table in tables if isinstance(tables, list) else ():
            rows = []
            for row in table["rows"]:
                counts = [value if isinstance(value, int) else 0 for value in row[1:]]
                total = sum(counts) or 1
                shades = [0.0, *(count / total if table["shades"] else 0.0 for count in counts)]
                cells = [figure(value) if isinstance(value, float) else value for value in row]
                rows.append(list(zip(cells, shades, strict=True)))
            shown.append({**table, "who": who, "rows": rows})
    return shown
