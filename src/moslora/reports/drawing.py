"""Plots as SVG elements that take the colors of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moslora.reports.formatting import UNIT, number, section_of
from moslora.wording import figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["INKS", "drawing", "loss_curve"]


# Colors of the plot are placeholders for CSS variables, so that one drawing serves light and dark.
INKS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--train)",
    "#050505": "var(--held-out)",
}
INK, MUTED, LINE, TRAIN, HELD_OUT = INKS
PLOT_POINTS = 600  # more than a screen shows; beyond that neighbors are averaged


def loss_curve(log: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], width: float) -> str:
    """Draw losses over steps with the learning rate below, as an SVG element to put into a page.

    Args:
        log: Lines of ``metrics.jsonl``; those without a finite ``loss`` or ``eval_loss`` are passed over.
        metrics: ``metrics`` of ``run.json``, for the held-out loss before and after.
        width: In inches; text keeps its size, so that a narrow drawing serves a phone.

    Returns:
        An ``<svg>`` element, colored by the page's CSS variables; equal input gives equal text.
    """
    train, held_out, rates = (_series(log, key) for key in ("loss", "eval_loss", "learning_rate"))
    before, after = (number(section_of(metrics, phase).get("loss")) for phase in ("before", "after"))
    last = max((line.get("step", 0) for line in log), default=0)
    held_out = [point for point in held_out if 0 < point[0] < last]
    if before is not None:
        held_out.insert(0, (0, before))
    if after is not None:
        held_out.append((last, after))

    is_held_out = str(metrics.get("unit") or UNIT).startswith("held-out")

    def paint(figure: Figure) -> None:
        ratios = {"height_ratios": [4, 1]} if rates else {}
        axes = figure.subplots(2 if rates else 1, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
        _draw_losses(axes[0], train, held_out, "held-out" if is_held_out else "measured")
        if rates:
            axes[1].plot(*zip(*_thinned(rates), strict=True), color=MUTED, linewidth=1.2)
            axes[1].set_ylabel("learning\nrate")
            axes[1].set_ylim(bottom=0)
            axes[1].locator_params(axis="y", nbins=2)
            axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axes[-1].set_xlabel("step")
        axes[-1].locator_params(axis="x", integer=True, nbins=6)

    return drawing("Loss by training step", (width, 4.2), paint, name=f"moslora-{width}")


def drawing(
    description: str, size: tuple[float, float], paint: Callable[[Figure], None], name: str | None = None
) -> str:
    """Draw an SVG element to put into a page, colored by the page's CSS variables.

    Args:
        description: Alternative text for screen readers.
        size: Width and height in inches.
        paint: Draws on matplotlib's figure, in ``INKS``.
        name: Of this drawing among those of a page; the description by default.

    Returns:
        An ``<svg>`` element; equal input gives equal text.
    """
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": name or description,
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.useoffset": False,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": LINE,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change a report
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _as_element(buffer.getvalue(), description)


def _draw_losses(
    axes: Axes, train: list[tuple[int, float]], held_out: list[tuple[int, float]], label_of_dots: str
) -> None:
    values = [value for _, value in train + held_out]
    # A loss that falls 30-fold is a flat line on a linear axis for most of its way.
    logarithmic = min(values) > 0 and max(values) / min(values) > 30
    axes.set_yscale("log" if logarithmic else "linear")
    axes.set_ylabel("loss (log scale)" if logarithmic else "loss")
    axes.grid(axis="y", linewidth=0.8)
    smooth = len(train) >= 20
    if train:
        steps, losses = zip(*_thinned(train), strict=True)
        alpha, label = (0.35, None) if smooth else (1.0, "training")
        axes.plot(steps, losses, color=TRAIN, alpha=alpha, linewidth=1.0, label=label)
    if smooth:
        steps, losses = zip(*_thinned(_smoothed(train)), strict=True)
        axes.plot(steps, losses, color=TRAIN, linewidth=2.0, label="training (smoothed)")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        # Two points far apart joined by a line would claim a course that nobody measured.
        joined = ":" if len(held_out) > 2 else "none"
        dots: dict[str, Any] = {"color": HELD_OUT, "linestyle": joined, "marker": "o", "markersize": 6}
        axes.plot(steps, losses, label=label_of_dots, clip_on=False, zorder=5, **dots)
        for step, loss in {held_out[0], held_out[-1]}:
            right = step > steps[0]
            axes.annotate(
                figure(loss),
                (step, loss),
                textcoords="offset points",
                xytext=(-4 if right else 8, 8),
                ha="right" if right else "left",
                color=HELD_OUT,
            )
    axes.legend(frameon=False, loc="upper right")


def _as_element(document: str, description: str) -> str:
    """Strip what only a file of its own needs, and let CSS choose the colors and the typeface.

    Args:
        document: An SVG file as matplotlib writes it, drawn in ``INKS``.
        description: Alternative text for screen readers.

    Returns:
        An ``<svg>`` element to put into a page.
    """
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"\s*<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    opening, rest = element.split(">", 1)
    opening = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", opening)
    element = f"{opening}>{rest}"
    for placeholder, ink in INKS.items():
        element = element.replace(placeholder, ink)
    element = element.replace("'DejaVu Sans'", "system-ui, sans-serif")
    # Both drawings stand in one page, where an identifier may stand once.
    element = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in element else "", element)
    return element.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)


def _series(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = ((line.get("step"), number(line.get(key))) for line in log)
    return [(step, value) for step, value in points if isinstance(step, int) and value is not None]


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return means over a tenth of the run around each point; means over the past would lag behind."""
    reach = len(points) // 20
    smoothed = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)  # as far to the left as to the right
        window = points[index - near : index + near + 1]
        smoothed.append((step, sum(value for _, value in window) / len(window)))
    return smoothed


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    stride = math.ceil(len(points) / PLOT_POINTS)
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def has_curve(log: Sequence[Mapping[str, Any]]) -> bool:
    return bool(_series(log, "loss") or _series(log, "eval_loss"))
