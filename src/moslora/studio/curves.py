"""Curves of runs as SVG, drawn as in the reports, in the page's colors."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moslora.reports.drawing import INKS, drawing, has_curve, loss_curve
from moslora.studio.markup import escape
from moslora.studio.runs import Metrics, RunState

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn_once", "histogram", "run_curve", "two_curves"]

WIDTHS = (7.2, 4.0)  # inches, for a screen and for a telephone
INK, MUTED, LINE, FIRST, SECOND = INKS
KEPT = 200  # drawings

# matplotlib's settings are the process's, so one drawing is made at a time.
_one_at_a_time = threading.Lock()
_drawn: OrderedDict[Any, str] = OrderedDict()
_newest: dict[Any, tuple[float, str]] = {}
# Seconds between two drawings of what grows: each takes half a second of a processor that may be training.
AT_MOST_EVERY = 6.0


def drawn_once(key: Any, draw: Callable[[float], str], growing: Any = None) -> str:
    """Return a drawing for wide and one for narrow pages, of which the style shows one; what is known is not redrawn.

    Args:
        key: Of the drawing.
        draw: Makes it in a width, in inches.
        growing: Names what is drawn again and again as it grows, which is not done at every look; None for what is
            drawn whenever it changed.
    """
    with _one_at_a_time:
        now = time.monotonic()
        last, svg = _newest.get(growing, (-math.inf, ""))
        if key not in _drawn and now - last < AT_MOST_EVERY:
            return svg
        if key not in _drawn:
            wide, narrow = (draw(width) for width in WIDTHS)
            _drawn[key] = f'<div class="drawing wide">{wide}</div><div class="drawing narrow">{narrow}</div>'
            while len(_drawn) > KEPT:
                _drawn.popitem(last=False)
            if growing is not None:
                _newest[growing] = (now, _drawn[key])
        _drawn.move_to_end(key)
        return _drawn[key]


def run_curve(state: RunState, log: Metrics) -> str:
    """Draw loss and learning rate of a run; empty if nothing was logged.

    Args:
        state: The run.
        log: What it logged.
    """
    lines = log.lines()
    if not has_curve(lines):
        return ""
    metrics = state.record.get("metrics") or {}
    key = ("run", str(state.path), log.identity, log.place, *state.held_out)
    growing = ("run", str(state.path)) if state.status == "running" else None
    return drawn_once(key, lambda width: loss_curve(lines, metrics, width), growing)


def two_curves(runs: Sequence[tuple[str, Metrics]]) -> str:
    """Draw the losses of two runs over each other, the second dashed; empty if nothing was logged.

    Args:
        runs: Names and logs.
    """
    drawn = [(name, log) for name, log in runs if log.losses]
    if not drawn:
        return ""
    key = ("two", *((name, str(log.path), log.identity, log.place) for name, log in drawn))

    def paint(figure: Figure) -> None:
        from moslora.studio.runs import thinned

        axes = figure.subplots()
        values = [value for _, log in drawn for _, value in log.losses]
        if min(values) > 0 and max(values) / min(values) > 30:
            axes.set_yscale("log")
        axes.grid(axis="y", linewidth=0.8)
        looks = ((FIRST, "-"), (SECOND, "--"))
        for number, (_, log) in enumerate(drawn):
            color, line = looks[number % 2]
            axes.plot(
                *zip(*thinned(log.losses, 500), strict=True), color=color, linestyle=line, linewidth=1.6
            )
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        axes.locator_params(axis="x", integer=True, nbins=6)

    names = "".join(
        f'<li class="{look}">{escape(name)}</li>'
        for look, (name, _) in zip(("first", "second"), drawn, strict=False)
    )
    return f'<ul class="legend">{names}</ul>' + drawn_once(
        key, lambda width: drawing("Training loss of two runs", (width, 3.6), paint, name=f"two-{width}")
    )


def histogram(lengths: Sequence[int], limit: int | None, what: str = "tokens") -> str:
    """Draw how long examples are.

    Args:
        lengths: Of the examples.
        limit: Where longer ones are cut; None for nowhere.
        what: The unit.
    """
    if not lengths:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.hist(lengths, bins=min(40, max(1, len(set(lengths)))), color=FIRST)
        if limit is not None and limit <= 2 * max(lengths):
            axes.axvline(limit, color=SECOND, linestyle="--", linewidth=1.6)
            axes.annotate(
                "cut here", (limit, axes.get_ylim()[1]), color=SECOND, ha="right", va="top", rotation=90
            )
        axes.set_xlabel(f"{what} of an example")
        axes.set_ylabel("examples")
        axes.grid(axis="y", linewidth=0.8)

    key = ("histogram", tuple(lengths), limit, what)
    return drawn_once(
        key, lambda width: drawing("Lengths of the examples", (width, 2.6), paint, name=f"lengths-{width}")
    )
