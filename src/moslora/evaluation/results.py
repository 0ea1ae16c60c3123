"""What an evaluation found, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from moslora.display import Display, Printable
from moslora.evaluation.commonsense.questions import COMMONSENSE_TASKS, REPORTED
from moslora.metrics.change import change_of
from moslora.metrics.scored import is_share

__all__ = ["Activity", "Measure", "Report", "show"]


@dataclass(frozen=True)
class Activity:
    """What the adapter does to the logits.

    Attributes:
        effect: Largest difference of logits (or what ``what`` says) with and without it, on real inputs.
        learned: Whether any ΔW differs from zero; None where its format has no ΔW that is read.
        modules: How many modules of the model carry it.
        what: What was compared.
    """

    effect: float
    learned: bool | None
    modules: int
    what: str = "logits"


@dataclass(frozen=True)
class Measure:
    """One number of base and tuned model on the same items.

    Attributes:
        name: ``"loss"``, ``"exact_match"``, or a task's name (accuracy); where there are pictures ``"accuracy"`` and
            ``"accuracy_shuffled_images"``. On a set of ``evaluation.also``: ``"loss_NAME"``, and ``"kl_NAME"``, the KL
            from the base.
        items: How many.
        base: Of the base; None if the adapted model alone was asked for.
        base_interval: 95 %; None for losses, whose spread between examples is not an error of the difference.
        tuned, tuned_interval: Of the adapted model; None without an adapter.
        difference, low, high, p: Tuned less base, paired over items; None without an adapter.
        fixed, broken: Items that became right, and that became wrong; None for losses.
        published: MoSLoRA's published figure for LLaMA-3-8B, where there is one.
        protocol: By which it was judged, of commonsense tasks.
        unread: How many answers of the last model asked showed no choice, and count as wrong; None where none can.
    """

    name: str
    items: int
    base: float
    base_interval: tuple[float, float] | None = None
    tuned: float | None = None
    tuned_interval: tuple[float, float] | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    fixed: int | None = None
    broken: int | None = None
    published: float | None = None
    protocol: str = ""
    unread: int | None = None


@dataclass(frozen=True, repr=False)
class Report(Printable):
    """What an evaluation found.

    Attributes:
        model: The base.
        adapter: Its adapter, or None.
        protocol: ``"data"``, ``"lm-eval"``, or keys of ``PROTOCOLS`` separated by commas.
        activity: Whether the adapter is active; None without one.
        measures: In order.
        predictions: Every item with what both models did.
    """

    model: str
    adapter: str | None
    protocol: str
    activity: Activity | None
    measures: Sequence[Measure]
    predictions: Sequence[dict[str, Any]] = field(default_factory=tuple)

    def __getitem__(self, name: str) -> Measure:
        """Return a measure by its name; of several protocols the first."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        raise KeyError(f"{name!r} was not measured; there are {', '.join(m.name for m in self.measures)}.")

    def show(self, display: Display) -> None:
        """Write the measures, and some of the items that changed."""
        show(self, display)


def show(report: Report, display: Display, samples: int = 3) -> None:
    """Write a report for people.

    Args:
        report: What to show.
        display: Where to.
        samples: Items to show of those fixed, and of those broken.
    """
    if report.activity is not None:
        active = report.activity
        if active.effect == 0:
            display.warn(f"{report.adapter} learned nothing: every ΔW is 0, so base and tuned are one model.")
        else:
            display.say(
                f"Proven: the adapter is active in {active.modules} modules; it changes {active.what} by up to "
                f"{active.effect:.3g}."
            )
    kinds = list(dict.fromkeys(m.protocol for m in report.measures))
    for protocol in kinds:
        _show_measures(report, protocol, display)
    for sentence in _verdicts(report):
        display.say(sentence, style="bold")
    if len(kinds) > 1:
        _show_protocols(report, kinds, display)
    if any(m.published is not None for m in report.measures):
        _show_reported(report, display)
    for change, before in (("fixed", False), ("broken", True)):
        changed = [p for p in report.predictions if p["base_ok"] is before and p["tuned_ok"] is (not before)]
        for line in changed[:samples]:
            display.say(f"{change}: {_short(line['prompt'])}")
            display.say(
                f"  base {_short(line['base'])!r}  tuned {_short(line['tuned'])!r}  right {line['reference']!r}"
            )


def _verdicts(report: Report) -> list[str]:
    """Say of each measurement what the adapter did to it, where that is no gain."""
    said = []
    for m in report.measures:
        if m.tuned is None or m.difference is None or m.name.startswith("kl_"):
            continue  # a distance is never a gain
        name, form = m.name.replace("_", " "), _form(m)
        course = f"{form.format(m.base)} → {form.format(m.tuned)}"
        change = change_of(m.base, m.tuned, "lower" if _is_loss(m) else "higher")
        if change == "nothing":
            said.append(f"{name} did not change: {course}.")
        elif m.low is not None and m.high is not None and m.low <= 0 <= m.high:
            said.append(f"No difference in {name} could be shown: {course}, the 95 % interval holds 0.")
        elif change == "worse" and (_is_loss(m) or m.base_interval is not None):
            said.append(f"The adapter makes {name} worse: {course}.")
    return said


def _is_loss(measure: Measure) -> bool:
    return measure.name == "loss" or measure.name.startswith("loss_")


def _show_measures(report: Report, protocol: str, display: Display) -> None:
    measures = [m for m in report.measures if m.protocol == protocol]
    published = any(m.published is not None for m in measures)
    unread = any(m.unread is not None for m in measures)
    rows = []
    for m in measures:
        form = _form(m)
        cells = [m.name.replace("_", " "), str(m.items), form.format(m.base) + _ends(m.base_interval, form)]
        if report.adapter is not None:
            cells += _of_tuned(m, form)
        cells += [] if not unread else ["" if m.unread is None else str(m.unread)]
        cells += [] if not published else ["" if m.published is None else f"{m.published:.1f} %"]
        rows.append(cells)
    columns = ["", "items", "base"]
    if report.adapter is not None:
        columns += ["tuned", "difference (95 %)", "p", "fixed / broken"]
    columns += ["no choice found"] if unread else []
    if published:
        columns.append("published, of LLaMA-3-8B")
        base, tuned = _means(measures)
        mean = [f"mean of {len(measures)} tasks", "", f"{base:.1%}"]
        if report.adapter is not None:
            mean += [f"{tuned:.1%}", f"{tuned - base:+.1%}", "", ""]
        mean += [""] if unread else []
        own = [m.published for m in measures if m.published is not None]
        rows.append(
            [*mean, f"{fmean(own):.1f} %" + ("" if len(own) == len(COMMONSENSE_TASKS) else " (these)")]
        )
    display.table(f"{report.model}, protocol {protocol or report.protocol}", columns, rows)


def _of_tuned(m: Measure, form: str) -> list[str]:
    if m.tuned is None or m.difference is None:
        return [""] * 4
    signed = form.replace(":", ":+")
    reach = "" if m.low is None or m.high is None else f" ({signed.format(m.low)} to {signed.format(m.high)})"
    return [
        form.format(m.tuned) + _ends(m.tuned_interval, form),
        signed.format(m.difference) + reach,
        "" if m.p is None else f"{m.p:.2g}",
        "" if m.fixed is None else f"{m.fixed} / {m.broken}",
    ]


def _means(measures: Sequence[Measure]) -> tuple[float, float]:
    return fmean(m.base for m in measures), fmean(m.tuned or 0.0 for m in measures)


def _show_protocols(report: Report, protocols: Sequence[str], display: Display) -> None:
    """Show how protocols differ on the same models and items."""
    tuned = report.adapter is not None
    by = {(m.protocol, m.name): m for m in report.measures}
    names = list(dict.fromkeys(m.name for m in report.measures))
    rows = []
    for name in names:
        found = [by[protocol, name] for protocol in protocols]
        cells = [f"{m.base:.1%}" + (f" → {m.tuned:.1%}" if m.tuned is not None else "") for m in found]
        rows.append([name, *cells])
    means = [_means([m for m in report.measures if m.protocol == protocol]) for protocol in protocols]
    rows.append(["mean", *(f"{base:.1%}" + (f" → {then:.1%}" if tuned else "") for base, then in means)])
    display.table(
        "The same model and items by each protocol" + (", base → tuned" if tuned else ""),
        ["", *protocols],
        rows,
    )
    key = "tuned_label" if tuned else "base_label"
    labels = {(p["protocol"], p["place"]): p[key] for p in report.predictions}
    first = protocols[0]
    for other in protocols[1:]:
        places = [place for protocol, place in labels if protocol == first]
        same = fmean(labels[first, place] == labels[other, place] for place in places)
        display.say(f"{first} and {other} choose the same answer on {same:.0%} of the items.")


def _show_reported(report: Report, display: Display) -> None:
    rows = [
        [r.source, r.model, r.setting, f"{r.lora:.2f} %", f"{r.moslora:.2f} %", f"{r.moslora - r.lora:+.2f}"]
        for r in REPORTED
    ]
    display.table(
        "What others report, mean of eight tasks",
        ["source", "model", "setting", "LoRA", "MoSLoRA", "difference"],
        rows,
    )
    display.say(
        f"These are of other models, trained on 170 thousand examples: nothing that {report.model} scores here can be "
        "held against them. They show that the gain is contested."
    )


def _form(measure: Measure) -> str:
    """Return how a measure is written: losses and correlations as numbers, shares in percent."""
    return "{:.1%}" if is_share(measure.name, measure.base_interval is not None) else "{:.4f}"


def _ends(interval: tuple[float, float] | None, form: str) -> str:
    return "" if interval is None else f" ({form} to {form})".format(*interval)


def _short(text: str, length: int = 160) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"
