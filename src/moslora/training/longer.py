"""A run that is trained longer than its recipe said at first: what may change, what that does, and what is kept.

The checkpoint of the last step has optimizer, schedule and random state, so training goes on as if it had not ended,
but for the learning rate: a schedule that ends with the training is stretched over the new number of steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.files import write_text
from moslora.models.loading import default_device
from moslora.recipe.trainer_arguments import build_trainer_config
from moslora.training.measuring import evaluation_file
from moslora.training.proving import is_unproven
from moslora.training.run_directory import RunDirectory
from moslora.wording import did_you_mean

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.recipe.schema import Recipe

__all__ = ["Longer", "apply_longer", "lengthened", "plan_longer", "refuse_other_settings"]

LENGTHS = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Longer:
    """How a run is to be trained longer.

    Attributes:
        trainer: The lengths that change, as ``max_steps``.
        step: Optimizer steps that were taken.
        rate: The learning rate of the last of them; None if it is not known.
    """

    trainer: Mapping[str, Any]
    step: int
    rate: float | None

    @property
    def settings(self) -> list[str]:
        """The same as settings of a recipe."""
        return [f"trainer.{name}={value:g}" if isinstance(value, float) else f"trainer.{name}={value}"
                for name, value in self.trainer.items()]  # fmt: skip


def lengthened(record: Mapping[str, Any]) -> list[str]:
    """Return the settings by which a run was lengthened, which its recipe may not have yet.

    Args:
        record: ``run.json``.
    """
    found = record.get("lengthened")
    return Longer(found, 0, None).settings if isinstance(found, Mapping) else []


def refuse_other_settings(path: Path, settings: Sequence[str]) -> None:
    """Refuse settings beside ``--resume`` that are not lengths.

    Args:
        path: The run, which need not exist.
        settings: As of ``plan_longer``.

    Raises:
        UsageError: If there is one.
    """
    allowed = [f"trainer.{name}" for name in LENGTHS]
    for setting in settings:
        name, equals, _ = setting.partition("=")
        if name not in allowed or not equals:
            raise UsageError(
                f"--resume cannot be combined with {setting!r}: it takes {' and '.join(f'{a}=N' for a in allowed)}, to "
                f"train longer, and nothing else.{did_you_mean(name, allowed)} To train with other settings from the "
                f"weights that the run has, start a new one: adapter.start_from={path / 'adapter'}"
            )


def plan_longer(directory: RunDirectory, settings: Sequence[str]) -> Longer | None:
    """Check that a run can be trained longer.

    Args:
        directory: The run.
        settings: ``trainer.max_steps=N`` or ``trainer.num_train_epochs=N``.

    Returns:
        What changes; None where that was noted by an earlier call that was interrupted, which only has to continue.

    Raises:
        UsageError: If the run cannot continue or would not be longer.
    """
    from moslora.recipe.loading import load_recipe

    names = [setting.partition("=")[0] for setting in settings]
    if is_unproven(directory):
        raise UsageError(
            f"{directory.path} still has a proof to be made up for. First: moslora train --resume {directory.path}"
        )
    if not directory.recipe.is_file():
        raise UsageError(
            f"{directory.path} was stopped before its recipe was written. Start again as you did."
        )
    checkpoint = directory.latest_checkpoint(lambda _: None)
    if checkpoint is None:
        raise UsageError(
            f"{directory.path} has no checkpoint to train from: they were removed, or trainer.save_strategy is no. "
            "Start "
            f"a new run from its weights: adapter.start_from={directory.adapter}"
        )
    old = load_recipe([str(directory.recipe)]).trainer
    new = load_recipe([str(directory.recipe), *settings]).trainer
    state = json.loads((checkpoint.path / "trainer_state.json").read_text(encoding="utf-8"))
    changes = {name.partition(".")[2]: new[name.partition(".")[2]] for name in names}
    record = directory.read()
    if record.get("status") != "completed" and record.get("lengthened") == changes:
        return None
    is_done = "is completed and " if record.get("status") == "completed" else ""
    if new.get("max_steps", -1) > 0:
        if "max_steps" not in changes:
            raise UsageError(
                f"trainer.num_train_epochs does not count, because the run has trainer.max_steps={new['max_steps']}. "
                "Give "
                "trainer.max_steps=N."
            )
        if new["max_steps"] <= checkpoint.step:
            raise UsageError(
                f"trainer.max_steps={new['max_steps']} is not longer: {directory.path} {is_done}has taken "
                f"{checkpoint.step} steps. Give more than {checkpoint.step}."
            )
    elif new.get("num_train_epochs", 1) <= state.get("epoch", 0) or old == new:
        raise UsageError(
            f"trainer.num_train_epochs={new.get('num_train_epochs', 1):g} is not longer: {directory.path} {is_done}has "
            f"trained for {state.get('epoch', 0):g} epochs. Give more."
        )
    rates = [line["learning_rate"] for line in state.get("log_history", []) if "learning_rate" in line]
    return Longer(changes, checkpoint.step, rates[-1] if rates else None)


def apply_longer(directory: RunDirectory, longer: Longer, recipe: Recipe, display: Display) -> None:
    """Note that a run is trained longer, keep what it had measured, and say what becomes of the learning rate.

    What is written in the end is a consequence of ``run.json``, so a kill in between is made up for by the next
    ``--resume``.

    Args:
        directory: The run.
        longer: What changes.
        recipe: The run's, lengthened.
        display: Where to tell of it.
    """
    record = directory.read()
    history = list(record.get("history", []))
    if record.get("status") == "completed":
        old = {name: record.get("trainer", {}).get(name) for name in longer.trainer}
        history.append(
            {
                "ended": record.get("ended"),
                "steps": longer.step,
                "trainer": old,
                "metrics": record.get("metrics", {}).get("after", {}),
                "also": {name: cost.get("after", {}) for name, cost in record.get("also", {}).items()},
                "proofs": record.get("proofs", {}),
            }
        )
        # What was measured is in the record, and is measured again.
        for stage in ("after", "also"):
            evaluation_file(directory, stage).unlink(missing_ok=True)
    directory.update(status="interrupted", lengthened=dict(longer.trainer), history=history)
    write_text(directory.recipe, recipe.to_yaml())
    what = " and ".join(f"trainer.{name}={value:g}" for name, value in longer.trainer.items())
    display.say(
        f"Trained for {longer.step} steps so far; now with {what}. Adapter, LoRA and report are made anew."
    )
    sentence = _rate_sentence(longer, recipe)
    if sentence:
        display.say(sentence)


def _rate_sentence(longer: Longer, recipe: Recipe) -> str:
    """Say what the learning rate was at the end, and what it is when training goes on."""
    config: Any = build_trainer_config(recipe, default_device(), ".", push_to_hub=False)
    kind = str(getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type))
    if config.max_steps <= 0:
        return (
            f"The schedule {kind} is stretched over the new number of steps, so the learning rate goes on from where "
            "it would be by now had the run been this long from the beginning."
        )
    rate = rate_at(config, longer.step)
    was = "" if longer.rate is None else f" ended at {longer.rate:.2g} and"
    if rate is None:
        return ""
    return (
        f"The schedule {kind} is stretched over {config.max_steps} steps: the learning rate{was} goes on at "
        f"{rate:.2g}, where it would be by now had the run been this long from the beginning. The steps so far were "
        "taken at "
        "other rates than in such a run."
    )


def rate_at(config: Any, step: int) -> float | None:
    """Return the learning rate of a schedule at a step; None if it depends on more than the step.

    Args:
        config: The trainer's configuration, with ``max_steps``.
        step: Steps that were taken.
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule: Any = get_scheduler(
        config.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=config.get_warmup_steps(config.max_steps),
        num_training_steps=config.max_steps,
        scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
    )
    lambdas = getattr(schedule, "lr_lambdas", None)
    return None if lambdas is None else float(config.learning_rate * lambdas[0](step))
