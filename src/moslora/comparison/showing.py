"""A comparison's verdict on a terminal: the table of methods, what was found, and what was confirmed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moslora.comparison.costs import show_confirmed_costs, show_costs
from moslora.comparison.results import Confirmation, Verdict
from moslora.metrics.intervals import Difference

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["show_verdict"]


def show_verdict(verdict: Verdict, display: Display) -> None:
    """Show every method at its best rate, what can be said of their differences, and what was confirmed.

    Args:
        verdict: Of one stage or both.
        display: Where to show it.
    """
    if any(result.points for result in verdict.methods):
        _show_tuning(verdict, display)
    elif verdict.given is not None:
        display.say(f"Rates: {verdict.given.source}.")
    if verdict.confirmation is not None:
        _show_confirmation(verdict.confirmation, verdict.judged_by, display)


def _show_tuning(verdict: Verdict, display: Display) -> None:
    rows = []
    for result in verdict.methods:
        if not result.points:
            continue  # tuned elsewhere
        interval = "{:.4f} to {:.4f}".format(*result.interval) if result.interval else ""
        stable = "{:g} to {:g}".format(*result.stable) if result.stable else "–"
        best = [p for p in result.points if p.learning_rate == result.best_rate]
        rows.append(
            [
                result.name,
                "–" if result.best_rate is None else f"{result.best_rate:g}",
                "–" if result.score is None else f"{result.score:.4f}",
                interval,
                " ".join(f"{p.test:.4f}" for p in best if p.test is not None),
                *([] if not _asks(verdict) else [_share(result.exact_match)]),
                stable,
                f"{result.diverged} / {result.crashed}",
                "–" if result.trainable_parameters is None else f"{result.trainable_parameters:,}",
                "–" if result.seconds is None else f"{result.seconds:.1f} s",
                "–" if result.peak_bytes is None else f"{result.peak_bytes / 1e9:.2f} GB",
            ]
        )
    asked = [verdict.judged_by] if _asks(verdict) else []
    columns = ["", "best rate", "held-out loss", "95 % over seeds", "each seed", *asked, "stable rates"]
    columns += ["diverged / crashed", "trained", "time", "peak memory"]
    display.say()
    of_base = "" if verdict.base_judged is None else f", {verdict.judged_by} {verdict.base_judged:.1%}"
    stage = "" if verdict.confirmation is None else "First stage, in which rates were tuned. "
    display.table(
        f"{stage}Base without training: held-out loss {verdict.base_loss:.4f}{of_base}", columns, rows
    )
    show_costs(verdict, display)
    for contrast in verdict.contrasts:
        if contrast.measure == "exact_match":
            found = contrast.difference
            what = verdict.judged_by[0].upper() + verdict.judged_by[1:]
            display.say(
                f"{what}, {contrast.method} less {contrast.baseline}: {found.mean:+.1%} (95 % interval "
                f"{found.low:+.1%} to {found.high:+.1%}, corrected p = {contrast.p_corrected:.2g})."
            )
    for sentence in verdict.sentences:
        display.say(sentence, style="bold" if verdict.confirmation is None else "dim")
    for caution in verdict.cautions:
        display.say(f"Note: {caution}")


def _show_confirmation(found: Confirmation, judged_by: str, display: Display) -> None:
    rows = []
    asks = any(method.exact_match is not None for method in found.methods)
    for method in found.methods:
        rows.append(
            [
                method.name,
                f"{method.rate:g}",
                "–" if method.score is None else f"{method.score:.4f}",
                "{:.4f} to {:.4f}".format(*method.interval) if method.interval else "",
                *([_share(method.exact_match)] if asks else []),
                str(len(method.points)),
                f"{method.diverged} / {method.crashed}",
                "–" if method.seconds is None else f"{method.seconds:.1f} s",
            ]
        )
    columns = ["", "rate", "held-out loss", "95 % over seeds", *([judged_by] if asks else [])]
    columns += ["fresh seeds", "diverged / crashed", "time"]
    display.say()
    display.table(
        f"Second stage: fresh seeds, {found.examples} held-out examples; base {found.base_loss:.4f}",
        columns,
        rows,
    )
    display.table(
        "Differences of the second stage",
        ["", "difference", "interval", "seeds", "corrected p", "of it seeds / examples"],
        [
            [
                f"{c.method} less {c.baseline}" + ("" if c.measure == "loss" else f", {judged_by}"),
                f"{c.difference.mean:+.4f}",
                f"{c.difference.low:+.4f} to {c.difference.high:+.4f}",
                str(c.difference.seeds),
                f"{c.p_corrected:.2g}",
                f"±{c.difference.half_of_seeds:.2g} / ±{c.difference.half_of_examples:.2g}",
            ]
            for c in found.contrasts
        ],
    )
    if found.prices:
        display.table(
            "Other rates than the best",
            [
                "",
                "rate",
                "did not finish",
                "worse than base",
                "loss less that at the best rate",
                "less the baseline's",
            ],
            [
                [
                    f"{price.method}, {price.factor:g} ×",
                    f"{price.rate:g}",
                    f"{price.diverged + price.crashed} of {price.seeds}",
                    f"{price.worse_than_base} of {price.seeds}",
                    _signed(price.difference),
                    _signed(price.beside_baseline),
                ]
                for price in found.prices
            ],
        )
    show_confirmed_costs(found.costs, display)
    for sentence in found.sentences:
        display.say(sentence, style="bold")
    for caution in found.cautions:
        display.say(f"Note: {caution}")


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return "–"
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _asks(verdict: Verdict) -> bool:
    return any(result.exact_match is not None for result in verdict.methods)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
