"""A command that can be given again: it starts a run, or goes on with it, and never starts a second one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.errors import UsageError
from moslora.recipe.loading import load_recipe
from moslora.recipe.schema import Recipe
from moslora.training.context import only_of_first
from moslora.training.handed_over import HandedOver
from moslora.training.proving import is_unproven
from moslora.training.run import resume, train_recipe
from moslora.training.run_directory import HEARTBEAT_SECONDS, FollowedRun, RunDirectory

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["start_or_continue"]

# Seconds for which a run that seems to be in progress on another machine is waited for: that machine may be gone.
WAIT = 1.5 * HEARTBEAT_SECONDS


def start_or_continue(
    recipe: Recipe, display: Display, command: str = "", handed_over: HandedOver | None = None
) -> RunDirectory:
    """Start a recipe's run; go on with it if it was begun; leave it as it is if it is completed.

    Args:
        recipe: A checked recipe. The run's folder is ``output.dir`` and ``output.name`` together.
        display: Where to tell of progress.
        command: How it was called, for ``run.json``.
        handed_over: Callbacks and metrics of a script's.

    Returns:
        The run directory, completed.

    Raises:
        UsageError: If the run was begun with other settings, or there is a folder that is not a run in its place.
        BusyError: If another process holds the run, also after it was waited for.
        ProofError, TrainingError, Stopped: As of ``train``.
    """
    if handed_over is not None and handed_over.needs_files:
        raise UsageError(
            "A run of objects that a script hands over cannot be continued by the same call: name model and data as "
            "files, or use moslora.resume(run)."
        )
    path = Path(recipe.output.dir) / (recipe.output.name or recipe.task.kind)
    if not path.exists():
        return train_recipe(recipe, display, command, handed_over, only_as_named=True)
    directory = RunDirectory.open(path)
    _refuse_other_recipe(directory, recipe)
    if directory.read().get("status") == "completed" and not is_unproven(directory):
        only_of_first(display).say(f"{path} is completed; nothing is left to do.")
        return FollowedRun(path)
    return resume(path, display, handed_over, wait=WAIT)


def _refuse_other_recipe(directory: RunDirectory, recipe: Recipe) -> None:
    """Refuse settings that the run in a recipe's place was not begun with: going on would ignore them."""
    if not directory.recipe.is_file():
        return  # ``resume`` says so
    begun = load_recipe([str(directory.recipe)]).sections()
    other = sorted(_differing(recipe.sections(), begun))
    if other:
        raise UsageError(
            f"{directory.path} was begun with another recipe: {', '.join(other)} "
            f"{'differs' if len(other) == 1 else 'differ'}. Give the settings that it was begun with, or another "
            "output."
        )


def _differing(given: dict[str, Any], begun: dict[str, Any]) -> list[str]:
    """Name the settings that differ; what the run had filled in by itself is no difference."""
    found = []
    for section, values in given.items():
        if section == "output":
            continue
        old = begun.get(section)
        if section in ("trainer", "parallel") and isinstance(old, dict):
            found += [f"{section}.{key}" for key, value in values.items() if old.get(key, value) != value]
        elif section == "adapter" and given.get("mix") is not None:
            continue  # the mixed adapters decide it
        elif isinstance(values, dict) and isinstance(old, dict):
            keys = values.keys() | old.keys()
            found += [f"{section}.{key}" for key in keys if values.get(key) != old.get(key)]
        elif values != old and not (section == "parallel" and values.get("kind") == "auto"):
            found.append(section)
    return found
