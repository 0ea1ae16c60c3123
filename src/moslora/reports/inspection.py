"""The page of ``moslora inspect``: heat maps of what an adapter learned, which open offline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.adapters.inspection import Inspection
from moslora.files import new_file
from moslora.reports.page import render
from moslora.wording import figure_or_dash

__all__ = ["write_page"]

# What is drawn: the figure's name, its title, and its explanation.
MAPS = (
    ("relative_norm", "‖ΔW‖ ÷ ‖W0‖", "How much each weight moved, relative to its own size."),
    ("norm", "‖ΔW‖", "How much each weight moved."),
    ("effective_rank", "Effective rank of ΔW", "How many directions each update really uses, of at most r."),
    ("from_identity", "‖M - I‖ ÷ ‖I‖", "0 is plain LoRA: nothing is mixed."),
    ("from_orthogonal", "Distance of M from orthogonal", "0 mixes without stretching any direction."),
    ("moved", "‖M - M0‖ ÷ ‖M0‖", "How far the mixer moved from its start."),
    ("mixed_scale", "‖M·A‖ ÷ ‖A‖", "How the mixer scales A; about 0.58 for a fresh kaiming mixer."),
)


def write_page(inspection: Inspection, out: Path) -> None:
    """Write the figures as one page of heat maps that opens offline.

    Args:
        inspection: What to show.
        out: The ``.html`` file; must not exist yet.

    Raises:
        ExistsError: If something exists at ``out``.
    """
    has_mixers = any(report.from_identity > 0 for report in inspection.modules)
    maps = [
        drawn
        for figure, title, meaning in MAPS
        if (has_mixers or figure in ("relative_norm", "norm", "effective_rank"))
        and (drawn := _heat_map(inspection, figure, title, meaning)) is not None
    ]
    page = render(
        "inspection",
        inspection=inspection,
        maps=maps,
        spectra=_spectra(inspection) if has_mixers else [],
        shown=figure_or_dash,
    )
    with new_file(out) as place:
        place.write_text(page, encoding="utf-8")


def _heat_map(inspection: Inspection, figure: str, title: str, meaning: str) -> dict[str, Any] | None:
    """Lay a figure out as layers × kinds; several modules in a cell (experts) by their median."""
    cells: dict[tuple[str, str], list[float]] = {}
    for report in inspection.modules:
        value = getattr(report, figure)
        if value is not None:
            cells.setdefault((report.layer, report.kind), []).append(value)
    if not cells:
        return None
    middle = {place: statistics.median(values) for place, values in cells.items()}
    low, high = min(middle.values()), max(middle.values())
    layers, kinds = (list(dict.fromkeys(place[axis] for place in middle)) for axis in (0, 1))
    start = _shared_beginning(layers)

    def cell(layer: str, kind: str) -> dict[str, Any]:
        value = middle.get((layer, kind))
        share = 0.0 if value is None or high == low else (value - low) / (high - low)
        name = f"{layer}.{kind}".strip(".")
        return {"value": value, "heat": round(100 * share), "name": name}

    return {
        "title": title,
        "meaning": meaning,
        "low": low,
        "high": high,
        "start": start,
        "kinds": kinds,
        "rows": [
            {"layer": layer.removeprefix(start) or "none", "cells": [cell(layer, k) for k in kinds]}
            for layer in layers
        ],
    }


def _spectra(inspection: Inspection) -> list[dict[str, Any]]:
    """Lay out the singular values of the mixers, the median of each by kind of module."""
    drawn = []
    for group in inspection.groups:
        spectra = [
            r.mixer_values for r in inspection.modules if r.kind == group.kind and r.rank == group.rank
        ]
        values = [statistics.median(column) for column in zip(*spectra, strict=True)]
        drawn.append({"kind": group.kind, "values": values, "high": max(values) or 1.0})
    return drawn


def _shared_beginning(layers: Sequence[str]) -> str:
    """Return what the layers' names have in common up to a dot, as ``model.layers.``."""
    stems = {layer.rpartition(".")[0] for layer in layers}
    stem = stems.pop()
    return f"{stem}." if stem and not stems else ""
