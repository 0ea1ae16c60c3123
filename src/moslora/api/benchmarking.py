"""Picture benchmarks in one call: how a call's objects become a subject and a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora.display import Display
from moslora.errors import UsageError
from moslora.evaluation.benchmarks.evaluate import Wanted, evaluate_benchmarks
from moslora.evaluation.benchmarks.results import BenchmarkReport
from moslora.evaluation.judge import Subject
from moslora.models.names import resolve_model
from moslora.recipe.building import RecipeSource, build_recipe
from moslora.training.context import only_of_first
from moslora.training.stop import StopRequest

__all__ = ["evaluate_on_benchmarks", "listed"]


def listed(benchmark: Any) -> list[Path]:
    """Return the files of benchmarks: one, several, or texts with several separated by commas.

    Args:
        benchmark: A path, a text, or a sequence of these.
    """
    given = [benchmark] if isinstance(benchmark, str | os.PathLike) else list(benchmark)
    texts = [os.fspath(one) for one in given]
    whole = [[text] if Path(text).exists() else text.split(",") for text in texts]
    return [Path(text.strip()) for parts in whole for text in parts if text.strip()]


def evaluate_on_benchmarks(
    subject: Subject,
    files: Sequence[Path],
    display: Display,
    adapter: Path | None,
    recipe: RecipeSource,
    layers: Sequence[Mapping[str, Any]],
    settings: Sequence[str],
    out: str | os.PathLike[str] | None,
    named: str | None,
    limit: int | None,
    prompt: str | None,
    protocol: str | None,
    exchange: bool,
) -> BenchmarkReport:
    """Evaluate on picture benchmarks, with the checks that need no model first.

    Args:
        subject: The base.
        files: Their TSV files.
        display: Where progress is shown.
        adapter: A directory that PEFT loads, or None.
        recipe: Of ``task: vision``; how the model is loaded. None for the defaults.
        layers: Sections over it.
        settings: ``section.key=value`` over all of it.
        out, named, limit, prompt, protocol, exchange: As for ``Wanted``.

    Returns:
        The report.
    """
    if recipe is None:
        # Nothing of it is read but the model's section, and how pictures are opened.
        data = {"train": str(files[0]), "heldout": str(files[0])}
        layers = [{"task": {"kind": "vision"}, "data": data}, *layers]
    built: Any = build_recipe(recipe, *layers, settings=settings)
    if built.task.kind != "vision":
        raise UsageError(
            f"Picture benchmarks need a recipe of task: vision; this one is task: {built.task.kind}."
        )
    place = Path(out) if out is not None else Path("runs") / _name_of(subject, adapter)
    wanted = Wanted(files, place, named, limit, prompt, protocol or "published", exchange)
    if subject.model is None:
        resolve_model(subject.name)  # a name that is none is told before a large file is read
    shown = only_of_first(display)
    with StopRequest(shown) as stop:
        return evaluate_benchmarks(subject, built, shown, adapter, wanted, stop.check)


def _name_of(subject: Subject, adapter: Path | None) -> str:
    """Return a folder's name for an evaluation: the same for the same models, so that it is found again."""
    parts = [Path(subject.name).name]
    if adapter is not None:
        own = adapter.resolve()
        parts.append(own.name if own.name not in ("adapter", "lora") else f"{own.parent.name}-{own.name}")
    return "benchmarks-" + "-".join(re.sub(r"[^\w.-]", "-", part) for part in parts)
