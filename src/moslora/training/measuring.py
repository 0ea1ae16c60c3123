"""Measuring base and adapted model on held-out data, once, whatever interrupts the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import TrainingError
from moslora.files import write_text
from moslora.tasks.task import Answer, Evaluation, Shown, Table, Task
from moslora.training.artifacts import save_pictures
from moslora.training.context import RunContext
from moslora.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import nn


STAGES = ("before", "start", "after")


def evaluation_file(directory: RunDirectory, stage: str) -> Path:
    """Return the file in which a stage's measurements are kept."""
    return directory.path / f"evaluation-{stage}.json"


def read_evaluation(directory: RunDirectory, stage: str) -> Evaluation | None:
    """Read what was measured in a stage; None if nothing was yet."""
    kept = evaluation_file(directory, stage)
    if not kept.exists():
        return None
    found = json.loads(kept.read_text(encoding="utf-8"))
    answers = [Answer(**answer) for answer in found.pop("answers")]
    pictures = [Shown(**shown) for shown in found.pop("pictures", [])]
    tables = [Table(**table) for table in found.pop("tables", [])]
    return Evaluation(**found, answers=answers, pictures=pictures, tables=tables)


def measure(run: RunContext, task: Task, model: nn.Module, stage: str, label: str) -> Evaluation:
    """Evaluate, or read what an earlier try of the run has measured already.

    Every process that ``RunContext.measures`` calls it; the first one keeps the result.
    """
    kept, first = evaluation_file(run.directory, stage), run.team.is_main_process
    found = read_evaluation(run.directory, stage) if first else None
    if task.measures_together:
        found = run.team.broadcast(found)
    if found is not None:
        _record(run.directory, stage, found)  # it may have been killed before it was
        return found
    with run.stage(stage, f"measuring the {label}"):
        evaluation = task.evaluate(model, label)
    loss = evaluation.metrics["loss"]
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise TrainingError(
            f"The held-out loss of the {label} is {loss}. "
            + ("Training diverged; lower trainer.learning_rate." if stage == "after" else "Check the base.")
        )
    if not first:
        return evaluation
    evaluation = dataclasses.replace(evaluation, pictures=save_pictures(run, stage, evaluation.pictures))
    values = dataclasses.asdict(evaluation)
    for shown in values["pictures"]:
        del shown["data"]
    write_text(kept, json.dumps(values, ensure_ascii=False))
    _record(run.directory, stage, evaluation)
    return evaluation


def measure_costs(run: RunContext, task: Task, model: nn.Module, remembered: Any) -> dict[str, Any]:
    """Measure what tuning cost on other data, or read what an earlier try of the run has measured already.

    Args:
        run: The run.
        task: Prepared.
        model: The tuned model.
        remembered: From ``Task.remember_base``, before training.
    """
    kept, first = evaluation_file(run.directory, "also"), run.team.is_main_process
    known = json.loads(kept.read_text(encoding="utf-8")) if first and kept.exists() else None
    if task.measures_together:
        known = run.team.broadcast(known)
    if known is not None:
        found: dict[str, Any] = known
    else:
        with run.stage("also", "measuring what tuning cost"):
            found = task.costs(model, remembered)
        if not found or not first:
            return found
        write_text(kept, json.dumps(found, ensure_ascii=False, allow_nan=False))
    run.directory.update(also=found)
    return found


def restore_measurements(directory: RunDirectory) -> None:
    """Put into ``run.json`` what was measured and is not in it, as where a run was killed between the two.

    Args:
        directory: A run that nobody is running.
    """
    known = directory.read().get("metrics", {})
    for stage in STAGES:
        found = read_evaluation(directory, stage)
        if found is not None and stage not in known:
            _record(directory, stage, found)
    kept = evaluation_file(directory, "also")
    if kept.exists() and "also" not in directory.read():
        directory.update(also=json.loads(kept.read_text(encoding="utf-8")))


def _record(directory: RunDirectory, stage: str, evaluation: Evaluation) -> None:
    """Note what was measured, pictures by their places."""
    pictures = [dataclasses.asdict(shown) for shown in evaluation.pictures]
    for shown in pictures:
        del shown["data"]
    tables = [dataclasses.asdict(table) for table in evaluation.tables]
    directory.update(
        **({"pictures": {stage: pictures}} if pictures else {}),
        **({"tables": {stage: tables}} if tables else {}),
        **({"fidelity": {stage: dict(evaluation.fidelity)}} if evaluation.fidelity else {}),
        metrics={
            stage: dict(evaluation.metrics),
            "intervals": {stage: {name: list(ends) for name, ends in evaluation.intervals.items()}},
            "examples": evaluation.examples,
            "unit": evaluation.unit,
            "answers": len(evaluation.answers),
            **(
                {"baseline": dict(evaluation.baseline), "baseline_note": evaluation.baseline_note}
                if evaluation.baseline
                else {}
            ),
        },
    )


def record_change(run: RunContext, before: Evaluation, after: Evaluation) -> None:
    """Note how scores of pictures changed, prompt by prompt."""
    from moslora.tasks.image.fidelity import SCORES, paired_change

    names = [name for name in SCORES if name in before.fidelity and name in after.fidelity]
    if names:
        changes = {name: paired_change(before.fidelity[name], after.fidelity[name]) for name in names}
        run.directory.update(fidelity={"change": changes})
