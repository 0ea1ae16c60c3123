"""What training did to a measurement: better, worse, or nothing, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moslora.metrics.scored import is_share

__all__ = ["Change", "baseline_sentence", "change_of", "price_sentence", "training_verdict"]

Change = Literal["better", "worse", "nothing"]
# Relative. A loss that moved by less stands where it stood: in float32 a mean over thousands of tokens rounds to about
# 1e-6, in bfloat16 to 1e-4, and a step of training moves it by more.
LEAST = 1e-4


def change_of(before: float, after: float, better: Literal["lower", "higher"] = "lower") -> Change:
    """Say what became of a measurement.

    Args:
        before, after: Its values, unitless or in nats.
        better: Which way is up.

    Example:
        >>> change_of(5.552, 5.557), change_of(5.554, 5.554)
        ('worse', 'nothing')
    """
    if abs(after - before) <= LEAST * max(abs(before), abs(after)):
        return "nothing"
    return "better" if (after < before) == (better == "lower") else "worse"


def training_verdict(before: Mapping[str, Any], after: Mapping[str, Any], unit: str) -> tuple[Change, str]:
    """Say in a sentence what training did to the loss and to the shares of right answers.

    Args:
        before, after: Measurements of the base and of the tuned model, ``loss`` among them.
        unit: What they were measured on, as ``held-out examples``.

    Returns:
        What became of the loss, and the sentence; it says what to look at where nothing was gained.
    """
    one, two = float(before["loss"]), float(after["loss"])
    what = "Held-out loss" if unit.startswith("held-out") else f"Loss on {unit}"
    course = f"{one:.4f} → {two:.4f}"
    loss = change_of(one, two)
    worse = [
        f"{name.replace('_', ' ')} fell from {before[name]:.1%} to {after[name]:.1%}"
        for name in ("exact_match", "accuracy")
        if name in before and name in after and after[name] < before[name]
    ]
    also = f" {worse[0][0].upper()}{worse[0][1:]}." if worse else ""
    if loss == "nothing":
        return loss, (
            f"Training changed nothing: {what.lower()} {course}.{also} Look at adapter.lora_alpha, "
            "trainer.learning_rate and the number of steps."
        )
    if loss == "worse":
        return loss, f"Training made it worse: {what.lower()} {course}.{also} Lower trainer.learning_rate."
    return loss, f"{what} {course}: better.{also}"


def price_sentence(name: str, cost: Mapping[str, Any]) -> str:
    """Say in a sentence what tuning cost on data that it is not about.

    Args:
        name: Of the data.
        cost: As ``run.json`` has it under ``also``.
    """
    before, after = cost["before"].get("loss"), cost["after"].get("loss")
    kl, change = cost["after"].get("kl"), cost["change"].get("loss")
    if before is None or after is None or kl is None:
        return f"On {name} text the tuned model's loss or its KL from the base is not a finite number."
    course = f"loss on {name} text {before:.4f} → {after:.4f}"
    ends = (
        ""
        if change is None
        else " ({:+.4f}, 95 % {:+.4f} to {:+.4f})".format(change["mean"], change["low"], change["high"])
    )
    apart = f"KL from the base {kl:.4f} nats a token"
    if change_of(before, after) == "nothing" or (change and change["low"] <= 0 <= change["high"]):
        return f"No price could be shown: {course}{ends}; {apart}."
    if after < before:
        return f"It cost nothing there: {course}{ends}; {apart}."
    return f"The price: {course}{ends}; {apart}."


def baseline_sentence(measured: Mapping[str, Any]) -> str | None:
    """Say whether a tuned model is better than no model at all; None where that was not measured.

    Args:
        measured: ``metrics`` of ``run.json``.
    """
    baseline, after = measured.get("baseline"), measured.get("after")
    if not isinstance(baseline, Mapping) or not isinstance(after, Mapping):
        return None
    intervals = (measured.get("intervals") or {}).get("after") or {}
    name = next((key for key in after if key != "loss" and key in baseline and key in intervals), None)
    if name is None:
        return None
    low, high = intervals[name]
    form = "{:.1%}" if is_share(name, True) else "{:.4f}"
    course = (
        f"{name.replace('_', ' ')} {form.format(after[name])} ({form.format(low)} to {form.format(high)}), and "
        f"{form.format(baseline[name])} without a model"
    )
    if low > baseline[name]:
        return f"Better than without a model: {course}."
    if high < baseline[name]:
        return f"Worse than without a model: {course}."
    return f"No gain over what is reached without a model could be shown: {course}."
