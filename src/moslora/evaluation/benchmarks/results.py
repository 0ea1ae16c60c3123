"""What a benchmark's evaluation found, how it is shown, and the files that others read."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moslora.display import Display, Printable
from moslora.evaluation.benchmarks.scores import Figure
from moslora.evaluation.benchmarks.table import NINE
from moslora.evaluation.benchmarks.tsv import BenchmarkFile
from moslora.evaluation.results import Activity
from moslora.files import replaced_file, write_text

__all__ = ["BenchmarkReport", "BenchmarkResult", "mean_of_nine", "remarks", "write_predictions"]


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark.

    Attributes:
        name: As VLMEvalKit names it.
        known_by: ``"checksum"``, ``"name"`` or ``"as named"``.
        file, sha256: Its file.
        protocol: ``"published"``, or ``"letter"``.
        rules: Whose rules, with their version.
        prompt: One of ``prompts.PROMPTS``.
        items: How many were asked.
        figures: Its scores, the headline first; empty where answers are not public, or need a judge.
        exchanged: The headline with other items' pictures.
        categories: The headline by category.
        unread: Of the base and of the adapter, how many answers showed no option, and count as wrong.
        without_picture, read_as_empty: As ``BenchmarkFile`` counts them.
        notes: What to know about it.
        files: What was written, by what it is for.
        items_table: Every item with what both models answered.
    """

    name: str
    known_by: str
    file: str
    sha256: str
    protocol: str
    rules: str
    prompt: str
    items: int
    figures: Sequence[Figure]
    exchanged: Sequence[Figure]
    categories: Sequence[Figure]
    unread: Mapping[str, int]
    without_picture: int
    read_as_empty: int
    notes: Sequence[str]
    files: Mapping[str, str]
    items_table: Sequence[Mapping[str, Any]] = field(repr=False, default=())


@dataclass(frozen=True, repr=False)
class BenchmarkReport(Printable):
    """All benchmarks of an evaluation.

    Attributes:
        model: The base.
        adapter: Its adapter, or None.
        path: The folder with everything that was written.
        activity: How much the adapter moves the logits; None without one.
        results: In the order of the files.
    """

    model: str
    adapter: str | None
    path: Path
    activity: Activity | None
    results: Sequence[BenchmarkResult]

    def __getitem__(self, name: str) -> BenchmarkResult:
        """Return a benchmark's result by its name."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{name!r} was not asked; there are {', '.join(r.name for r in self.results)}.")

    def to_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` has: all but the single items, which are in ``answers.jsonl``."""
        results = [dataclasses.asdict(dataclasses.replace(result, items_table=())) for result in self.results]
        own = {"model": self.model, "adapter": self.adapter, "path": str(self.path)}
        activity = None if self.activity is None else dataclasses.asdict(self.activity)
        return {**own, "activity": activity, "results": results}

    def show(self, display: Display) -> None:
        """Write a table per benchmark, and what to know about it."""
        for result in self.results:
            show_result(result, display, self.adapter is not None)
        for sentence in self.sentences():
            display.say(sentence)
        display.say(f"Page, opens in a browser: {self.path / 'report.html'}")

    def sentences(self) -> list[str]:
        """Return what was found, in words: whether each headline changed, and the paper's mean if all nine are here."""
        found = []
        if self.activity is not None and self.activity.effect == 0:
            found.append("The adapter learned nothing: every ΔW is 0, so both are one model.")
        for result in self.results:
            figure = next(iter(result.figures), None)
            if figure is None or figure.difference is None or figure.low is None or figure.high is None:
                continue
            shown = "higher" if figure.low > 0 else "lower" if figure.high < 0 else "no difference shown"
            what = result.name if figure.name.startswith(result.name) else f"{result.name}, {figure.name}"
            found.append(
                f"{what}: {shown}. {figure.base:.1f} without the adapter, {figure.tuned:.1f} with it; difference "
                f"{figure.difference:+.1f}, 95 % interval {figure.low:+.1f} to {figure.high:+.1f}."
            )
        mean = mean_of_nine(self.results)
        if mean is not None:
            base, tuned = mean
            then = "" if tuned is None else f", with the adapter {tuned:.1f}"
            found.append(f"Mean of the paper's nine, MME in percent of 2800: {base:.1f}{then}.")
        return found


def show_result(result: BenchmarkResult, display: Display, has_adapter: bool) -> None:
    """Write one benchmark's numbers for people.

    Args:
        result: What was found.
        display: Where to.
        has_adapter: Whether there are numbers of an adapter.
    """
    columns = ["", "over", "base (95 %)"]
    columns += ["with adapter (95 %)", "difference (95 %)", "p"] if has_adapter else []
    rows = [_row(figure, has_adapter) for figure in result.figures]
    rows += [_row(figure, has_adapter, "with other pictures: ") for figure in result.exchanged]
    rows += [_row(figure, has_adapter, "  ") for figure in result.categories]
    title = f"{result.name}, {result.items} items, protocol {result.protocol}, prompt {result.prompt}"
    if rows:
        display.table(title, columns, rows)
    else:
        display.say(f"{title}: no score.")
    for note in remarks(result):
        display.say(note)


def remarks(result: BenchmarkResult) -> list[str]:
    """Return what to know about a result, a sentence each.

    Args:
        result: What was found.
    """
    found = []
    if any(result.unread.values()):
        counts = ", ".join(f"{count} of the {of}" for of, count in result.unread.items())
        found.append(
            f"No option was found in some answers, which count as wrong: {counts}, of {result.items} items each."
        )
    if result.without_picture:
        found.append(f"{result.without_picture} rows have no picture and were not asked.")
    if result.read_as_empty:
        found.append(
            f"{result.read_as_empty} items have a text such as None or NA, which tools that read the file with pandas "
            "leave out; here they are asked as they are written."
        )
    return [*found, *result.notes]


def _row(figure: Figure, has_adapter: bool, prefix: str = "") -> list[str]:
    cells = [
        prefix + figure.name,
        str(figure.units),
        _with_ends(figure.base, figure.base_low, figure.base_high),
    ]
    if has_adapter:
        signed = (
            ""
            if figure.difference is None
            else f"{figure.difference:+.1f} ({figure.low:+.1f} to {figure.high:+.1f})"
        )
        cells += [
            _with_ends(figure.tuned, figure.tuned_low, figure.tuned_high),
            signed,
            "" if figure.p is None else f"{figure.p:.2g}",
        ]
    return cells


def _with_ends(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{value:.1f} ({low:.1f} to {high:.1f})"


def mean_of_nine(results: Sequence[BenchmarkResult]) -> tuple[float, float | None] | None:
    """Return the paper's mean of nine benchmarks; None unless all nine have a score of the whole benchmark.

    Args:
        results: Of one model.
    """
    by_name = {result.name: result for result in results if result.figures}
    found = []
    for files in NINE.values():
        result = next((by_name[name] for name in files if name in by_name), None)
        if result is None or result.name == "MathVista_MINI":  # its score by rule is of a part
            return None
        headline = result.figures[0]
        scale = 28.0 if result.name == "MME" else 1.0
        found.append((headline.base / scale, None if headline.tuned is None else headline.tuned / scale))
    tuned = [value for _, value in found if value is not None]
    return sum(base for base, _ in found) / 9, sum(tuned) / 9 if len(tuned) == 9 else None


def write_predictions(file: BenchmarkFile, answers: Mapping[str, str], out: Path) -> dict[str, str]:
    """Write a prediction file as VLMEvalKit reads it: every column but the picture, and the answer.

    Args:
        file: The benchmark's file.
        answers: By index.
        out: Where, without its suffix.

    Returns:
        What was written, by what it is for: a ``.tsv``, and an ``.xlsx`` if openpyxl is installed.
    """
    columns = [name for name in file.columns if name != "image"]
    rows = [
        [*(item.cells.get(name, "") for name in columns), answers[item.index]]
        for item in file.items
        if item.index in answers
    ]
    table = [[*columns, "prediction"], *rows]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(table)
    written = out.with_name(f"{out.name}.tsv")
    write_text(written, text.getvalue())
    files = {"predictions": str(written)}
    if importlib.util.find_spec("openpyxl") is not None:
        import openpyxl  # type: ignore[import-untyped]
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE  # type: ignore[import-untyped]

        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        for row in table:
            sheet.append([ILLEGAL_CHARACTERS_RE.sub("", cell) for cell in row])
        with replaced_file(out.with_name(f"{out.name}.xlsx")) as place:
            book.save(place)
        files["predictions as a spreadsheet"] = str(out.with_name(f"{out.name}.xlsx"))
    return files
