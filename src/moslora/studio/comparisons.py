"""Comparisons on the page: what one would take, started, and watched as its cells end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from moslora.api.judging import check_comparison
from moslora.comparison.methods import METHODS
from moslora.display import Display
from moslora.errors import NotFoundError, UsageError
from moslora.reports.comparison import COLORS
from moslora.reports.drawing import drawing
from moslora.studio.curves import drawn_once
from moslora.studio.jobs import Job
from moslora.studio.markup import escape
from moslora.studio.recipes import Recipes
from moslora.studio.runs import read_record
from moslora.wording import duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Cells", "Choices", "Comparisons"]

MARKERS = "os^Dv<>PX*"  # a method is told by its mark as well as by its color


@dataclass(frozen=True)
class Choices:
    """What is to be compared.

    Attributes:
        methods: Names.
        rates: Learning rates separated by commas; empty for those around the recipe's.
        seeds: How many.
        steps: Optimizer steps of every training; None for the recipe's.
        validation: Training examples set aside to choose rates by.
        name: Of the comparison's folder.
    """

    methods: tuple[str, ...]
    rates: str = ""
    seeds: int = 3
    steps: int | None = None
    validation: int = 64
    name: str = ""

    @property
    def numbers(self) -> list[float]:
        """The learning rates.

        Raises:
            UsageError: If one is not a number.
        """
        try:
            return [float(part) for part in self.rates.replace(";", ",").split(",") if part.strip()]
        except ValueError:
            raise UsageError(f"{self.rates} is not a list of learning rates, such as 1e-4, 3e-4.") from None


@dataclass(frozen=True)
class Cells:
    """The cells of a comparison that are on disk.

    Attributes:
        path: Its folder.
        total: How many there will be in the first stage; None if the record does not say.
        done: Each one's result.
        methods: In the order of the record.
        is_judged: Whether there are results.
    """

    path: Path
    total: int | None
    done: tuple[dict[str, Any], ...]
    methods: tuple[str, ...]
    is_judged: bool


class Comparisons:
    """Comparisons of a workspace.

    Args:
        recipes: Its recipes.
    """

    def __init__(self, recipes: Recipes) -> None:
        self.recipes = recipes
        self.workspace = recipes.workspace
        self.library = recipes.library

    @staticmethod
    def methods() -> list[tuple[str, str]]:
        """Return what can be compared: what each is, and its name."""
        return [(f"{name}: {method.about}", name) for name, method in METHODS.items()]

    def names(self) -> list[str]:
        """Return the comparisons there are, the newest first."""
        found = sorted(self.library.find().comparisons, key=lambda path: -path.stat().st_mtime)
        return [self.workspace.shown(path) for path in found]

    def foresee(self, text: str, choices: Choices, display: Display) -> None:
        """Check a comparison, and tell what it would take and could show.

        Args:
            text: The recipe, YAML.
            choices: What is compared.
            display: Where to tell.
        """
        sections = self.recipes.check(text)
        check_comparison(
            sections,
            out=self.folder(choices),
            progress=display,
            methods=list(choices.methods) or None,
            learning_rates=choices.numbers or None,
            seeds=choices.seeds,
            steps=choices.steps,
            validation=choices.validation,
        )
        display.say(self._time(sections, choices))

    def _time(self, sections: dict[str, Any], choices: Choices) -> str:
        """Say how long it would take, by runs and cells of the same base on this machine."""
        model = sections.get("model")
        name = model.get("name") if isinstance(model, dict) else model
        paces = [
            pace
            for state in self.library.runs()
            if (state.record.get("base") or {}).get("name") == name
            and (pace := _pace(state.record, state.step))
        ]
        trainer = sections.get("trainer") or {}
        steps = choices.steps or trainer.get("max_steps")
        if not paces or not isinstance(steps, int) or steps < 1:
            return (
                "How long it takes is not known before the first cell has ended: no run of this base has ended here, "
                "or the recipe counts epochs."
            )
        cells = len(choices.methods or (1, 2)) * len(choices.numbers or (1, 2, 3)) * choices.seeds
        seconds = cells * steps * median(paces)
        return (
            f"About {duration(seconds)} of training for {cells} cells of {steps} steps, as fast as {len(paces)} "
            f"run{'s' * (len(paces) > 1)} of this base here ({median(paces):.2g} s a step); measuring comes on top."
        )

    def start(self, text: str, choices: Choices) -> Job:
        """Start a comparison in a process of its own.

        Args:
            text: The recipe, YAML.
            choices: What is compared.

        Raises:
            RecipeError, UsageError: If something is wrong; nothing is started.
        """
        if len(choices.methods) < 2:
            raise UsageError("Choose two methods or more to compare.")
        if choices.seeds < 2:
            raise UsageError("Choose two seeds or more: one says nothing about how much seeds differ.")
        sections = self.recipes.check(text)
        folder = self.folder(choices)
        if folder.exists():
            raise UsageError(f"{self.workspace.shown(folder)} exists. Choose another name.")
        file = self.recipes.write(sections, folder.name)
        arguments = ["compare", str(file), "--methods", ",".join(choices.methods), "--out", str(folder)]
        arguments += ["--seeds", str(choices.seeds), "--validation", str(choices.validation)]
        if choices.numbers:
            arguments += ["--learning-rates", ",".join(f"{rate:g}" for rate in choices.numbers)]
        if choices.steps:
            arguments += ["--steps", str(choices.steps)]
        return self.recipes.jobs.start(f"compare {folder.name}", arguments)

    def folder(self, choices: Choices) -> Path:
        """Return where a comparison goes.

        Args:
            choices: What is compared.

        Raises:
            UsageError: If its name is not that of a folder.
        """
        name = choices.name.strip() or "compare"
        if os.sep in name or name.startswith("."):
            raise UsageError(f"{name!r} is not a plain name for the comparison's folder.")
        return self.workspace.runs / name

    def go_on(self, name: str) -> Job:
        """Start the command of a comparison again, which continues it.

        Args:
            name: Of the comparison.

        Raises:
            UsageError: If the page did not start it.
        """
        path = self.workspace.find(name)
        known = [job for job in self.recipes.jobs.all() if str(path) in job.arguments]
        if not known:
            command = read_record(path / "compare.json").get("command") or "moslora compare …"
            raise UsageError(f"It was not started from this page. Its command continues it: {command}")
        if any(job.is_running for job in known):
            raise UsageError("It is running.")
        return self.recipes.jobs.start(known[0].title, known[0].arguments)

    def job(self, name: str) -> Job | None:
        """Return the newest command that the page started for a comparison; None if there is none.

        Args:
            name: Of the comparison.
        """
        path = str(self.workspace.find(name))
        return next((job for job in self.recipes.jobs.all() if path in job.arguments), None)

    def cells(self, name: str) -> Cells:
        """Read what has ended.

        Args:
            name: Of the comparison.

        Raises:
            NotFoundError: If it is gone.
        """
        path = self.workspace.find(name)
        if not (path / "compare.json").is_file():
            raise NotFoundError(f"There is no comparison {name} any more.")
        identity = read_record(path / "compare.json").get("identity") or {}
        methods = tuple(map(str, identity.get("methods") or ()))
        rates, seeds = identity.get("learning_rates") or (), identity.get("seeds") or ()
        given = (identity.get("rates_from") or {}).get("rates") or {}
        done = []
        for file in sorted((path / "cells").glob("*.json")):
            cell = read_record(file)
            if isinstance(cell.get("method"), str):
                done.append(cell)
        total = (len(methods) - len(given)) * len(rates) * len(seeds)
        return Cells(path, total or None, tuple(done), methods, (path / "results.json").is_file())


def _pace(record: Mapping[str, Any], steps: int) -> float | None:
    seconds = (record.get("timing") or {}).get("train_seconds")
    return seconds / steps if isinstance(seconds, int | float) and seconds > 0 and steps else None


def cell_rows(cells: Cells) -> list[list[str]]:
    """Return a row of the table for each method and rate: losses of its seeds.

    Args:
        cells: Of a comparison.
    """
    rows = []
    for method in cells.methods:
        own = [cell for cell in cells.done if cell["method"] == method]
        for rate in sorted({cell["learning_rate"] for cell in own}):
            group = [cell for cell in own if cell["learning_rate"] == rate]
            values = [fmean(cell["validation"]) for cell in group if cell.get("validation")]
            tests = [fmean(cell["test"]) for cell in group if cell.get("test")]
            lost = sum(cell.get("status") != "done" for cell in group)
            rows.append(
                [
                    method,
                    f"{rate:g}",
                    str(len(group)),
                    f"{fmean(values):.4f}" if values else "–",
                    f"{fmean(tests):.4f}" if tests else "–",
                    str(lost or ""),
                ]
            )
    return rows


def cell_plot(cells: Cells) -> str:
    """Draw every cell's validation loss by learning rate; empty while there is none.

    Args:
        cells: Of a comparison.
    """
    points = [
        (cell["method"], cell["learning_rate"], fmean(cell["validation"]))
        for cell in cells.done
        if cell.get("validation")
    ]
    if not points:
        return ""

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for number, method in enumerate(cells.methods):
            own = [(rate, value) for name, rate, value in points if name == method]
            if own:
                axes.plot(
                    *zip(*own, strict=True),
                    MARKERS[number % len(MARKERS)],
                    color=COLORS[number % len(COLORS)],
                    markersize=7,
                    alpha=0.8,
                    label=method,
                )
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss")
        axes.grid(axis="y", linewidth=0.8)
        axes.legend(frameon=False)

    return drawn_once(
        ("cells", str(cells.path), tuple(points)),
        lambda width: drawing(
            f"Validation loss of {escape(cells.path.name)}", (width, 3.6), paint, name=f"cells-{width}"
        ),
    )
