"""What a run is made from, beside its recipe: whether it fits together, and whether it is still what it was."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from moslora.adapters.lineage import describe_lineage
from moslora.errors import UsageError
from moslora.recipe.schema import Recipe
from moslora.tasks.task import Task
from moslora.training.mix import Mix, open_mix
from moslora.training.run_directory import RunDirectory
from moslora.training.start_from import StartingAdapter

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["check_mix", "check_same_inputs", "check_start", "hashes_of", "with_mix"]


def with_mix(recipe: Recipe) -> tuple[Recipe, Mix | None]:
    """Open the adapters that a recipe mixes, and let them decide modules and ranks."""
    if recipe.mix is None:
        return recipe, None
    mix = open_mix(recipe.mix.adapters, recipe.mix.weights, recipe.model.name)
    return mix.adjust(recipe), mix


def check_mix(mix: Mix | None, task: Task, display: Display) -> None:
    """Refuse adapters of another base, and say what is mixed."""
    if mix is None:
        return
    base = task.base
    warning = mix.check_base(task.recipe.model.name, str(base.path), task.hashes()["base"])
    if warning:
        display.warn(warning)
    for path, weight in zip(mix.sources, mix.weights, strict=True):
        display.say(f"Mixing {path}, weight {weight:g}: its A and B stay as they are.")
    display.say(
        "Modules and ranks are the adapters'; of the recipe's adapter section lora_dropout alone counts."
    )


def check_start(start: StartingAdapter | None, task: Task, display: Display) -> None:
    """Refuse a start that was trained on another base, and say what training starts from."""
    if start is None:
        return
    base = task.base
    warning = start.check_base(task.recipe.model.name, str(base.path), task.hashes()["base"])
    if warning:
        display.warn(warning)
    display.say(f"Starting from {start.path}: structure, mixers and values are its own.")
    for line in describe_lineage(start.lineage or {}):
        display.say(f"  {line}")


def hashes_of(task: Task, mix: Mix | None, start: StartingAdapter | None = None) -> dict[str, Any]:
    """Return what identifies everything that a run is made from."""
    if start is not None:
        return {**task.hashes(), "start": dict(start.hashes)}
    if mix is None:
        return task.hashes()
    return {
        **task.hashes(),
        "adapters": [dict(hashes) for hashes in mix.hashes],
        "weights": list(mix.weights),
    }


def check_same_inputs(directory: RunDirectory, hashes: dict[str, Any]) -> None:
    """Refuse to continue with other data or another base than the run began with."""
    old = directory.read().get("hashes")
    if old is None:
        return
    changed = [name for name in hashes if old.get(name) != json.loads(json.dumps(hashes[name]))]
    if changed:
        raise UsageError(
            f"Cannot continue with {directory.path}: its {' and '.join(changed)} changed since it began. Put "
            "the old files back, or start a new run."
        )
