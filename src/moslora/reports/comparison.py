"""The report of a comparison: one HTML file that opens offline, made only from what the comparison left on disk.

The verdict comes first, in words; then the paired differences, every seed point, and the learning-rate curves. What
diverged or crashed is drawn as a cross at the top, so that it cannot be overlooked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.files import write_text
from moslora.reports.drawing import INKS, drawing
from moslora.reports.page import render
from moslora.reports.pareto import draw_pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_comparison_report"]

INK, MUTED, LINE, _, _ = INKS
# Readable on white and on black; a method keeps its color on the whole page.
COLORS = (
    "#2f7ed8",
    "#e0662b",
    "#1d9a6c",
    "#b657c9",
    "#c79a1b",
    "#d6446a",
    "#5b6fd6",
    "#6f8f2d",
    "#20a4b8",
    "#9a6b4f",
)


def write_comparison_report(folder: Path, about: Mapping[str, str]) -> Path:
    """Write ``report.html`` of a comparison, replacing an older one.

    Args:
        folder: The comparison's, with ``compare.json`` and ``results.json``.
        about: What each method is, by name.

    Returns:
        Path of the report. The same files in give the same bytes out.
    """
    record = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    colors = {m["name"]: COLORS[i % len(COLORS)] for i, m in enumerate(results["methods"])}
    second = results.get("confirmation")  # version 0.1 had none
    tuned = [m for m in results["methods"] if m["points"]]
    drawings = []
    # A denoiser's loss is no likelihood.
    is_of_images = record["identity"]["recipe"].get("task", {}).get("kind") == "image"
    unit = "mean squared error" if is_of_images else "nats per token"
    if any(c["measure"] == "loss" for c in results["contrasts"]):
        drawings.append(
            _differences_of(
                results, "Paired differences" if second is None else "Differences when tuning", colors, unit
            )
        )
    if tuned:
        drawings.append(
            {
                "title": "Every seed at the best rate",
                "text": "Held-out loss of each seed, rates chosen on validation examples. Lines join equal seeds.",
                "svg": _draw("Seed points by method", 3.4, lambda axes: _seeds(axes, tuned, colors)),
            }
        )
        drawings.append(
            {
                "title": "Learning rates",
                "text": "Validation loss by learning rate; dots are seeds, lines their means where every seed "
                "finished. Crosses at the top diverged or crashed.",
                "svg": _draw(
                    "Validation loss by learning rate", 3.8, lambda axes: _rates(axes, tuned, colors)
                ),
            }
        )
    for data in results.get("base_also") or ():
        if any(data in point["also"] for point in results["points_also"]):
            text = (
                f"What a method brings, to the left, against what it costs on {data} text, downwards: lower left is "
                "better. Diamonds are means of seeds at the best rate, dots their seeds, faint dots other rates; the "
                "line joins the methods that no other beats in both."
            )
            stage = "" if second is None else ", first stage"
            title = f"Loss on the task against {data} text{stage}"
            drawings.append({"title": title, "text": text, "svg": draw_pareto(results, data, colors)})
    page = render(
        "comparison",
        name=folder.name,
        results=results,
        record=record,
        about=about,
        colors=colors,
        drawings=drawings,
        second=second,
        confirmed=_of_second_stage(second, colors, unit) if second else [],
        tuned=tuned,
        points=[(m["name"], p) for m in results["methods"] for p in m["points"]],
        asks=any(m["exact_match"] is not None for m in results["methods"]),
        unit="as mean squared error" if is_of_images else "in nats per trained token",
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _differences_of(
    found: Mapping[str, Any],
    title: str,
    colors: Mapping[str, str],
    unit: str,
    level: str = "95 % interval",
) -> dict[str, str]:
    rows = [c for c in found["contrasts"] if c["measure"] == "loss"]
    return {
        "title": title,
        "text": "Held-out loss, first method less second, same seed and same examples: left of zero the first is "
        f"better. Dots are seeds, bars the mean with its {level} for new seeds and new examples.",
        "svg": _draw(
            "Paired differences with intervals",
            1.2 + 0.55 * max(2, len(rows)),
            lambda axes: _differences(axes, rows, colors, unit),
        ),
    }


def _of_second_stage(second: Mapping[str, Any], colors: Mapping[str, str], unit: str) -> list[dict[str, str]]:
    """Draw the second stage: differences on fresh seeds, and what other rates cost."""
    drawings = []
    if any(c["measure"] == "loss" for c in second["contrasts"]):
        drawings.append(_differences_of(second, "Differences on fresh seeds", colors, unit, "interval"))
    if second["prices"]:
        drawings.append(
            {
                "title": "Wrong rates",
                "text": "Held-out loss at a multiple of each method's best rate less that at the best rate, same "
                "seeds, with intervals. Crosses at the top mark that a seed did not finish, with how many of how many.",
                "svg": _draw(
                    "Price of a wrong rate", 3.8, lambda axes: _prices(axes, second["prices"], colors)
                ),
            }
        )
    return drawings


def _prices(axes: Axes, prices: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    names = list(dict.fromkeys(price["method"] for price in prices))
    factors = sorted({price["factor"] for price in prices})
    axes.axhline(0, color=MUTED, linewidth=1)
    for column, name in enumerate(names):
        shift = (column - (len(names) - 1) / 2) * 0.7 / max(1, len(names))
        own = {price["factor"]: price for price in prices if price["method"] == name}
        label: str | None = name
        for place, factor in enumerate(factors):
            price = own.get(factor)
            if price is None:
                continue
            x, found = place + shift, price["difference"]
            if found is not None:
                axes.plot([x, x], [found["low"], found["high"]], color=colors[name], linewidth=2.5)
                axes.plot([x], [found["mean"]], "D", color=colors[name], markersize=6, label=label)
                label = None
            lost = price["diverged"] + price["crashed"]
            if lost:
                axes.annotate(
                    f"✕ {lost}/{price['seeds']}",
                    (x, 1),
                    xycoords=("data", "axes fraction"),
                    textcoords="offset points",
                    xytext=(0, -10 - 10 * column),
                    ha="center",
                    fontsize=8,
                    color=colors[name],
                )
    axes.set_xticks(range(len(factors)), [f"{factor:g} ×" for factor in factors])
    axes.set_xlim(-0.5, len(factors) - 0.5)
    axes.set_xlabel("rate, as a multiple of the method's best")
    axes.set_ylabel("loss more than at the best rate")
    axes.grid(axis="y", linewidth=0.8)
    axes.legend(frameon=False)


def _draw(description: str, height: float, paint: Callable[[Axes], None]) -> str:
    return drawing(description, (7.2, height), lambda figure: paint(figure.subplots()))


def _differences(
    axes: Axes, contrasts: Sequence[Mapping[str, Any]], colors: Mapping[str, str], unit: str
) -> None:
    axes.axvline(0, color=MUTED, linewidth=1)
    for row, contrast in enumerate(contrasts):
        found, color = contrast["difference"], colors[contrast["method"]]
        axes.plot(
            [found["low"], found["high"]], [row, row], color=color, linewidth=2.5, solid_capstyle="butt"
        )
        axes.plot([found["mean"]], [row], "D", color=color, markersize=7)
        axes.plot(
            contrast["by_seed"], [row + 0.18] * len(contrast["by_seed"]), "o", color=color, alpha=0.6, ms=4
        )
    axes.set_yticks(range(len(contrasts)), [f"{c['method']}\nless {c['baseline']}" for c in contrasts])
    axes.set_ylim(len(contrasts) - 0.5, -0.5)
    axes.set_xlabel(f"difference in held-out loss, {unit}")
    axes.grid(axis="x", linewidth=0.8)


def _seeds(axes: Axes, methods: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    lines: dict[int, list[tuple[int, float]]] = {}
    for column, method in enumerate(methods):
        best = [p for p in method["points"] if p["learning_rate"] == method["best_rate"]]
        for point in best:
            lines.setdefault(point["seed"], []).append((column, point["test"]))
    for points in lines.values():
        axes.plot(*zip(*points, strict=True), color=LINE, linewidth=1, zorder=1)
        for column, value in points:
            name = methods[column]["name"]
            axes.plot([column], [value], "o", color=colors[name], markersize=6, zorder=2)
    axes.set_xticks(range(len(methods)), [m["name"] for m in methods], rotation=20)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylabel("held-out loss")
    axes.grid(axis="y", linewidth=0.8)


def _rates(axes: Axes, methods: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    lost: list[tuple[float, str]] = []
    values: list[float] = []
    for method in methods:
        color, means = colors[method["name"]], []
        for rate in sorted({p["learning_rate"] for p in method["points"]}):
            points = [p["validation"] for p in method["points"] if p["learning_rate"] == rate]
            known: Sequence[float] = [value for value in points if value is not None]
            values += known
            axes.plot([rate] * len(known), known, "o", color=color, alpha=0.55, markersize=4)
            if len(known) == len(points):
                means.append((rate, sum(known) / len(known)))
            lost += [(rate, color)] * (len(points) - len(known))
        label = method["name"]
        axes.plot(*(zip(*means, strict=True) if means else ([], [])), color=color, linewidth=1.8, label=label)
    axes.set_xscale("log")
    if values and min(values) > 0 and max(values) / min(values) > 10:
        axes.set_yscale("log")
    for index, (rate, color) in enumerate(lost):
        axes.annotate(
            "✕",
            (rate, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(0, -8 - 9 * (index % 6)),
            ha="center",
            color=color,
        )
        axes.plot([rate], [min(values) if values else 1.0], alpha=0)  # the axis reaches as far
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.grid(axis="y", linewidth=0.8)
    axes.legend(frameon=False)
