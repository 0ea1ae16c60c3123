"""Measuring base and adapted model on held-out data, once, whatever interrupts the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moslora.errors import TrainingError
from moslora.files import write_text
from moslora.tasks.task import Answer, Evaluation, Shown, Task
from moslora.training.artifacts import save_pictures
from moslora.training.context import RunContext

if TYPE_CHECKING:
    from torch import nn


def evaluation_file(run: RunContext, stage: str) -> Path:
    """Return the file in which a stage's measurements are kept."""
    return run.directory.path / f"evaluation-{stage}.json"


def read_evaluation(run: RunContext, stage: str) -> Evaluation | None:
    """Read what was measured in a stage; None if nothing was yet."""
    kept = evaluation_file(run, stage)
    if not kept.exists():
        return None
    found = json.loads(kept.read_text(encoding="utf-8"))
    answers = [Answer(**answer) for answer in found.pop("answers")]
    pictures = [Shown(**shown) for shown in found.pop("pictures", [])]
    return Evaluation(**found, answers=answers, pictures=pictures)


def measure(run: RunContext, task: Task, model: nn.Module, stage: str, label: str) -> Evaluation:
    """Evaluate, or read what an earlier try of the run has measured already."""
    kept = evaluation_file(run, stage)
    found = read_evaluation(run, stage)
    if found is not None:
        return found
    with run.stage(stage, f"measuring the {label}"):
        evaluation = task.evaluate(model, label)
    loss = evaluation.metrics["loss"]
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise TrainingError(
            f"The held-out loss of the {label} is {loss}. "
            + ("Training diverged; lower trainer.learning_rate." if stage == "after" else "Check the base.")
        )
    evaluation = dataclasses.replace(evaluation, pictures=save_pictures(run, stage, evaluation.pictures))
    values = dataclasses.asdict(evaluation)
    for shown in values["pictures"]:
        del shown["data"]
    write_text(kept, json.dumps(values, ensure_ascii=False))
    run.directory.update(
        **({"pictures": {stage: values["pictures"]}} if values["pictures"] else {}),
        **({"fidelity": {stage: dict(evaluation.fidelity)}} if evaluation.fidelity else {}),
        metrics={
            stage: dict(evaluation.metrics),
            "intervals": {stage: {name: list(ends) for name, ends in evaluation.intervals.items()}},
            "examples": evaluation.examples,
            "unit": evaluation.unit,
            "answers": len(evaluation.answers),
        },
    )
    return evaluation


def record_change(run: RunContext, before: Evaluation, after: Evaluation) -> None:
    """Note how scores of pictures changed, prompt by prompt."""
    from moslora.tasks.image.fidelity import SCORES, paired_change

    names = [name for name in SCORES if name in before.fidelity and name in after.fidelity]
    if names:
        changes = {name: paired_change(before.fidelity[name], after.fidelity[name]) for name in names}
        run.directory.update(fidelity={"change": changes})
