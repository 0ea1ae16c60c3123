"""Which values of the trainer's arguments can be trained with at all; the types are checked elsewhere.

The trainer itself takes many of these, and trains on nothing, for another number of steps, or fails in its first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["unfit_values"]


def _at_least_one(value: float) -> bool:
    return value >= 1


def _not_negative(value: float) -> bool:
    return value >= 0


def _positive(value: float) -> bool:
    return value > 0


Bound = tuple[Callable[[float], bool], str]
AT_LEAST_ONE: Bound = (_at_least_one, "at least 1")
NOT_NEGATIVE: Bound = (_not_negative, "at least 0")
SHARE: Bound = (lambda value: 0 <= value < 1, "at least 0 and below 1")
BOUNDS: dict[str, Bound] = {
    "learning_rate": (_positive, "above 0: with a rate of 0 nothing is learned"),
    "per_device_train_batch_size": AT_LEAST_ONE,
    "per_device_eval_batch_size": AT_LEAST_ONE,
    "gradient_accumulation_steps": AT_LEAST_ONE,
    "max_steps": (
        lambda value: value >= 1 or value == -1,
        "at least 1, or -1 to train for trainer.num_train_epochs",
    ),
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "dataloader_num_workers": NOT_NEGATIVE,
}


def unfit_values(trainer: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with values of a recipe's ``trainer`` section, a line each.

    Args:
        trainer: The section, its values of the right types.
    """
    problems = [
        f"trainer.{name}={value:g} must be {bound}."
        for name, value in trainer.items()
        if name in BOUNDS and _is_number(value)
        for fits, bound in [BOUNDS[name]]
        if not (math.isfinite(value) and fits(value))
    ]
    steps, warmup = trainer.get("max_steps", -1), trainer.get("warmup_steps", 0)
    epochs = trainer.get("num_train_epochs", 1)
    if _is_number(steps) and _is_number(warmup) and 1 <= steps < warmup:
        problems.append(
            f"trainer.warmup_steps={warmup:g} is above trainer.max_steps={steps}, so the learning rate is never "
            "reached. Give fewer, or a fraction of all steps below 1."
        )
    if _is_number(steps) and _is_number(epochs) and steps < 1 and not epochs > 0:
        problems.append(f"trainer.num_train_epochs={epochs:g} trains for no step; it must be above 0.")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
