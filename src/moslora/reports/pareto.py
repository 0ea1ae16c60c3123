"""What methods brought against what they cost, as a drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from moslora.reports.drawing import INKS, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_pareto", "frontier"]

INK, MUTED, LINE, _, _ = INKS
LABELS = {"loss": "loss on {} text", "kl": "KL from the base on {} text"}
FAR = 10  # a ratio of losses beyond which an axis is logarithmic


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points that no other beats in one number without losing in the other, by the first.

    Args:
        points: Two numbers each, of which lower is better.

    Example:
        >>> frontier({"a": (1.0, 3.0), "b": (2.0, 1.0), "c": (2.0, 3.0)})
        ['a', 'b']
    """
    names = sorted(points, key=lambda name: points[name])
    kept: list[str] = []
    for name in names:
        if not kept or points[name][1] < points[kept[-1]][1]:
            kept.append(name)
    return kept


def draw_pareto(results: Mapping[str, Any], data: str, colors: Mapping[str, str]) -> str:
    """Draw the held-out loss of the task against loss and KL on other data, method by method.

    Args:
        results: ``results.json`` of a comparison.
        data: The name of the other data.
        colors: By method.

    Returns:
        An ``<svg>`` element: small dots are cells, large ones the mean of a method's seeds at its best rate.
    """
    points = [point for point in results["points_also"] if data in point["also"]]
    base = results["base_also"][data]

    def paint(figure: Figure) -> None:
        for axes, measure in zip(figure.subplots(1, 2), LABELS, strict=True):
            _paint(axes, points, data, measure, colors)
            start = base if measure == "loss" else 0.0
            axes.axhline(start, color=MUTED, linewidth=1, linestyle=":")
            axes.annotate(
                "the untrained base",
                (1, start),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                xytext=(0, 3),
                ha="right",
                color=MUTED,
            )
            axes.set_xlabel("held-out loss of the task")
            axes.set_ylabel(LABELS[measure].format(data))
            axes.grid(linewidth=0.8)

    return drawing(f"Loss on the task against {data} text", (7.2, 3.8), paint)


def _paint(
    axes: Axes, points: Sequence[Mapping[str, Any]], data: str, measure: str, colors: Mapping[str, str]
) -> None:
    means: dict[str, tuple[float, float]] = {}
    for name, color in colors.items():
        own = [point for point in points if point["method"] == name]
        for point in own:
            at = (point["test"], point["also"][data][measure])
            axes.plot(*at, "o", color=color, alpha=0.6 if point["best"] else 0.2, markersize=4)
        best = [point for point in own if point["best"]]
        if best:
            means[name] = (
                fmean(point["test"] for point in best),
                fmean(point["also"][data][measure] for point in best),
            )
            axes.plot(*means[name], "D", color=color, markersize=8, label=name, zorder=3)
    best_names = frontier(means)
    if len(best_names) > 1:
        axes.plot(*zip(*(means[name] for name in best_names), strict=True), color=INK, linewidth=1, zorder=2)
    tests = [point["test"] for point in points]
    if min(tests) > 0 and max(tests) / min(tests) > FAR:
        axes.set_xscale("log")
    axes.legend(frameon=False, fontsize=8)
