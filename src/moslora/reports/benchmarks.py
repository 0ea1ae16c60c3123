"""The page of an evaluation on picture benchmarks: scores with intervals, and items fixed and broken with pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora.files import write_text
from moslora.reports.page import render
from moslora.wording import evenly_spaced

__all__ = ["write_benchmark_report"]

SHOWN = 12  # items of a group
SIDE = 224  # pixels of a picture in the page
PAGE_BYTES = 3_000_000  # of all pictures in a page

# Figures of others, by benchmark: XTuner's own models trained on the same data (their model cards), and the paper's.
REPORTED: Mapping[str, Sequence[str]] = {
    "MMBench_TEST_EN": (
        "XTuner LLaVA-InternLM2-7B 73.3, LLaVA-Llama-3-8B 68.9",
        "the paper's MoSLoRA of InternLM2-7B 73.8 (its split is not said)",
    ),
    "MMBench_DEV_EN": ("XTuner LLaVA-InternLM2-7B 74.6",),
    "MMBench_TEST_CN": ("XTuner LLaVA-InternLM2-7B 71.7, LLaVA-Llama-3-8B 61.6",),
    "MMBench_DEV_CN": ("XTuner LLaVA-InternLM2-7B 72.0",),
    "CCBench": ("XTuner LLaVA-InternLM2-7B 42.5, LLaVA-Llama-3-8B 30.4",),
    "SEEDBench_IMG": ("XTuner LLaVA-InternLM2-7B 71.2, LLaVA-Llama-3-8B 69.8",),
    "AI2D_TEST": ("XTuner LLaVA-Llama-3-8B 60.9",),
    "ScienceQA_TEST": ("XTuner LLaVA-Llama-3-8B 73.3",),
    "MMStar": ("XTuner LLaVA-Llama-3-8B 38.2",),
    "POPE": ("XTuner LLaVA-Llama-3-8B 87.2",),
    "TextVQA_VAL": ("XTuner LLaVA-Llama-3-8B 58.0, with another prompt",),
    "MME": ("XTuner LLaVA-InternLM2-7B 1700, LLaVA-Llama-3-8B 1506 + 295",),
    "MMVet": ("XTuner LLaVA-InternLM2-7B 35.9", "the paper's MoSLoRA and QMoSLoRA of InternLM2-7B 35.2"),
    "MathVista_MINI": ("XTuner LLaVA-InternLM2-7B 25.5, the whole benchmark with a judge",),
}


def write_benchmark_report(
    out: Path,
    name: str,
    sentences: Sequence[str],
    results: Sequence[Mapping[str, Any]],
    pictures: Callable[[str, str], Sequence[Any]],
) -> Path:
    """Write ``report.html``, replacing an older one.

    Args:
        out: The evaluation's folder.
        name: Base and adapter.
        sentences: What was found, first of all.
        results: Each benchmark's, as ``BenchmarkResult`` has them, with ``remarks`` and every item.
        pictures: From a benchmark's name and an item's index to its pictures.

    Returns:
        Path of the page; it opens offline.
    """
    left = PAGE_BYTES
    shown = []
    for result in results:
        groups = _groups(result["items_table"])
        for group in groups:
            for line in group["lines"]:
                line["seen"] = []
                for uri in map(_thumbnail, pictures(result["name"], line["index"]) if left > 0 else ()):
                    left -= len(uri)
                    line["seen"].append(uri)
        rows = [
            *map(_row, result["figures"]),
            *(_row(figure, "with other pictures") for figure in result["exchanged"]),
            *(_row(figure, "category") for figure in result["categories"]),
        ]
        shown.append({**result, "rows": rows, "groups": groups, "others": REPORTED.get(result["name"], ())})
    tuned = any(row["tuned"] for result in shown for row in result["rows"])
    page = render("benchmarks", name=name, sentences=sentences, results=shown, tuned=tuned)
    path = out / "report.html"
    write_text(path, page)
    return path


def _groups(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the items that the adapter fixed and broke; without an adapter some that are right and wrong."""
    graded = [item for item in items if "base_grade" in item]
    if any("tuned_grade" in item for item in graded):
        kinds = {
            "Fixed by the adapter": [i for i in graded if i["tuned_grade"] > i["base_grade"]],
            "Broken by the adapter": [i for i in graded if i["tuned_grade"] < i["base_grade"]],
            "Wrong with and without": [i for i in graded if i["tuned_grade"] == i["base_grade"] < 1],
        }
    else:
        kinds = {
            "Wrong": [i for i in graded if i["base_grade"] < 1],
            "Right": [i for i in graded if i["base_grade"] == 1],
        }
    groups = []
    for title, lines in kinds.items():
        chosen = [{**line, "tuned": line.get("tuned")} for line in evenly_spaced(lines, SHOWN)]
        some = f", {len(chosen)} shown" if len(chosen) < len(lines) else ""
        if lines:
            groups.append({"title": f"{title}: {len(lines)} items{some}", "lines": chosen})
    return groups


def _row(figure: Mapping[str, Any], about: str = "") -> dict[str, Any]:
    def number(key: str, form: str = "{:.1f}") -> str:
        return "" if figure[key] is None else form.format(figure[key])

    def ends(low: str, high: str, form: str = "{:.1f}") -> str:
        return "" if figure[low] is None else f"{number(low, form)} to {number(high, form)}"

    return {
        "name": figure["name"],
        "about": about,
        "units": figure["units"],
        "base": number("base"),
        "base_ends": ends("base_low", "base_high"),
        "tuned": number("tuned"),
        "tuned_ends": ends("tuned_low", "tuned_high"),
        "difference": number("difference", "{:+.1f}"),
        "ends": ends("low", "high", "{:+.1f}"),
        "p": number("p", "{:.2g}"),
    }


def _thumbnail(picture: Any) -> str:
    """Return a small copy as a data URI; a tiny picture is enlarged, so that it can be seen."""
    from PIL import Image

    small = picture.copy()
    if max(small.size) < SIDE // 2:
        factor = SIDE // 2 // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
