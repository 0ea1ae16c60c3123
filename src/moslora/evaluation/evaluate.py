"""Evaluate: base and tuned model side by side, on the same items, with intervals and the items that changed.

Held-out loss and answers on one's own data, or commonsense tasks by the published protocol and by log-likelihood. That
the adapter is active is proven first: an evaluation that ignores it is a known accident, and looks like "no effect".
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moslora.display import Display
from moslora.errors import UsageError
from moslora.evaluation.commonsense.protocols import PROTOCOLS, evaluate_commonsense
from moslora.evaluation.judge import Subject
from moslora.evaluation.lm_eval import evaluate_lm_eval
from moslora.evaluation.own_data import evaluate_own_data
from moslora.evaluation.results import Report
from moslora.files import new_file
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import Recipe

if TYPE_CHECKING:
    from moslora.tasks.language import AnswerMetric

__all__ = [
    "evaluate",
]


def evaluate(
    model: str | Subject,
    display: Display,
    *,
    adapter: Path | None = None,
    recipe: str | Recipe | None = None,
    data: str | None = None,
    settings: Sequence[str] = (),
    tasks: Sequence[str] = (),
    protocol: str = "answer-text",
    harness: Sequence[str] = (),
    limit: int | None = None,
    predictions: Path | None = None,
    metrics: Mapping[str, AnswerMetric] | None = None,
) -> Report:
    """Evaluate a model, and an adapter beside it.

    Args:
        model: The base: hub id, folder, GGUF file or packaged name; or with objects of a script's.
        display: Where to show progress.
        adapter: A directory that PEFT loads; None for the base alone.
        recipe: Its held-out data, metric and settings are used; a ``Recipe`` as it is.
        data: A file of examples to judge by; with ``tasks`` the folder of their data.
        settings: ``section.key=value`` over the recipe.
        tasks: Commonsense tasks, keys of ``COMMONSENSE_TASKS``.
        protocol: For tasks, keys of ``PROTOCOLS`` separated by commas; several are shown side by side.
        harness: Tasks of EleutherAI's lm-eval, by name or as paths of its YAML files.
        limit: Items at most, of each task.
        predictions: A JSONL to write every item to; must not exist yet.
        metrics: By name, functions of an answer and its reference, of own data.

    Returns:
        The report.

    Raises:
        UsageError: If something cannot be used.
        BusyError, ExistsError: If another process writes the predictions, or they are there.
        ProofError: If the adapter's ΔW is not zero and the logits do not move.
    """
    protocols = list(dict.fromkeys(name.strip() for name in protocol.split(",") if name.strip()))
    for name in protocols or [protocol]:
        if name not in PROTOCOLS:
            raise UsageError(f"protocol={name!r} is unknown; choose from {', '.join(PROTOCOLS)}.")
    if not tasks and not harness and recipe is None and data is None:
        raise UsageError(
            "Nothing to evaluate on: give --data FILE, --recipe FILE, --task NAME with --data FOLDER, or --lm-eval "
            "TASKS."
        )
    if harness and (tasks or recipe is not None or data is not None):
        raise UsageError("--lm-eval brings its own data; run it without --task, --recipe and --data.")
    ignored = [*(["the recipe"] if recipe is not None else []), *settings]
    if (tasks or harness) and ignored:
        raise UsageError(
            f"These tasks bring their own questions and protocol, so {', '.join(ignored)} would not be used. Run them "
            "without."
        )
    subject = model if isinstance(model, Subject) else Subject(model)
    if metrics and (tasks or harness):
        raise UsageError("metrics judges answers to your own data; these tasks have their own metrics.")
    with contextlib.ExitStack() as claimed:
        # Claimed before the work, so that no second evaluation works for the same place.
        place = None if predictions is None else claimed.enter_context(new_file(Path(predictions)))
        if harness:
            report = evaluate_lm_eval(subject, display, adapter, harness, limit)
        elif tasks:
            report = evaluate_commonsense(subject, display, adapter, data, tasks, protocols, limit)
        else:
            if not isinstance(recipe, Recipe):
                # Nothing is trained on, so a file of examples serves as both halves of a recipe.
                both = [] if data is None else [f"data={data}", f"data.heldout={data}"]
                given = [*([recipe] if recipe else []), f"model={subject.name}", *both, *settings]
                recipe = load_recipe(given)
            report = evaluate_own_data(subject, display, adapter, recipe, limit, metrics or {})
        if place is not None:
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in report.predictions)
            place.write_text("".join(lines), encoding="utf-8", newline="\n")
    return report
