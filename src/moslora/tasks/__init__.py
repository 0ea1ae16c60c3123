"""One package per task, and the table that names them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moslora import versions

if TYPE_CHECKING:
    from moslora.tasks.task import Task

__all__ = ["TASKS", "find_task"]

# The class of each task; imported when it is used, because each imports heavy packages of its own.
TASKS: dict[str, str] = {
    "text": "moslora.tasks.text.task:TextTask",
    "vision": "moslora.tasks.vision.task:VisionTask",
    "preference": "moslora.tasks.preference.task:PreferenceTask",
    "classification": "moslora.tasks.classification.task:ClassificationTask",
    "reward": "moslora.tasks.reward.task:RewardTask",
    "image": "moslora.tasks.image.task:ImageTask",
}


def find_task(kind: str) -> type[Task]:
    """Import the class of a task.

    Args:
        kind: A key of ``TASKS``; the recipe has checked it.

    Returns:
        The class.

    Raises:
        KeyError: If there is no such task.
        VersionError: If PEFT, transformers or TRL is older than the tasks are written for.
    """
    versions.require_for_command()
    module, _, name = TASKS[kind].partition(":")
    found: Any = getattr(importlib.import_module(module), name)
    return found  # type: ignore[no-any-return]
