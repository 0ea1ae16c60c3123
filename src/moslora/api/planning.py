"""Counting the memory of a fine-tune before anything is downloaded."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from moslora.api.objects import take_objects
from moslora.display import Display, find_display
from moslora.failures import verb
from moslora.memory.plan import Plan, count_memory
from moslora.recipe.building import RecipeSource, build_recipe

__all__ = ["leaves_data_out", "plan"]


@verb("plan")
def plan(
    recipe: RecipeSource = None,
    *,
    length: int | None = None,
    scored: int | None = None,
    quantize: str | None = None,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **sections: Any,
) -> Plan:
    """Predict how much memory of each GPU a fine-tune needs, and name a sufficient card. Needs no weights, no GPU.

    Args:
        recipe: A recipe's path, a dict of its sections or a ``Recipe``; data may be left out.
        length: Tokens of every row; the recipe's ``trainer.max_length`` if None.
        scored: Tokens of every row that are trained on; all of them if None.
        quantize: ``"nf4"`` to count the base in 4 bits, as bitsandbytes stores it.
        settings: Over all of it, ``section.key=value`` as on the command line.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.
        **sections: Sections and objects as for ``train``: ``model="org/base"``, ``trainer={"max_length": 512}``. Of a
            loaded model the configuration is used; data are not read.

    Returns:
        The plan: for one GPU, for DDP and for FSDP. Its ``repr`` is the table.

    Raises:
        RecipeError: If the recipe is wrong.
        ModelError: If the model's configuration cannot be read.
        PlanError: If this fine-tune cannot be counted.

    Example:
        >>> moslora.plan(model="base-model", length=64).placements[0].gpus
        1
    """
    layers, objects = take_objects(**sections)
    if leaves_data_out(recipe, layers, settings):
        layers.append({"data": "none"})
    built = build_recipe(recipe, *layers, settings=settings)
    counts: dict[str, Any] = {
        "length": length,
        "scored": scored,
        "quantize": quantize,
        "say": find_display(progress).say,
    }
    if objects.model is None:
        return count_memory(built, **counts)
    with tempfile.TemporaryDirectory(prefix="moslora-plan-") as folder:
        objects.model.config.save_pretrained(folder)
        named = built.model_copy(update={"model": built.model.model_copy(update={"name": folder})})
        counted = count_memory(named, **counts)
    return dataclasses.replace(
        counted, model=getattr(objects.model, "name_or_path", "") or type(objects.model).__name__
    )


def leaves_data_out(
    recipe: RecipeSource, layers: Sequence[Mapping[str, Any]], settings: Sequence[str]
) -> bool:
    """Return whether no data are named. A recipe's file has to name them, because it is meant to be trained.

    Args:
        recipe: A recipe's path, sections or ``Recipe``.
        layers: Sections over it.
        settings: ``section.key=value`` over all of it.
    """
    if recipe is not None and not isinstance(recipe, Mapping):
        return False
    named = {setting.split("=", 1)[0].split(".", 1)[0] for setting in settings}
    return "data" not in named.union(recipe or (), *layers)
