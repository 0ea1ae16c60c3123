"""Counting the memory of a fine-tune before anything is downloaded."""

from __future__ import annotations

from typing import Any

from moslora.display import Display, find_display
from moslora.failures import verb
from moslora.memory.plan import Plan, count_memory
from moslora.recipe.building import RecipeSource, build_recipe

__all__ = ["plan"]


@verb("plan")
def plan(
    recipe: RecipeSource = None,
    *,
    length: int | None = None,
    scored: int | None = None,
    quantize: str | None = None,
    progress: str | Display | None = None,
    **sections: Any,
) -> Plan:
    """Count what a fine-tune takes of each GPU's memory, and name a card that does. Needs no weights and no GPU.

    Args:
        recipe: A recipe's path, a dict of its sections or a ``Recipe``; data may be left out.
        length: Tokens of every row; the recipe's ``trainer.max_length`` if None.
        scored: Tokens of every row that are trained on; all of them if None.
        quantize: ``"nf4"`` to count the base in 4 bits, as bitsandbytes stores it.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.
        **sections: Sections over the recipe's, as for ``train``: ``model="org/base"``, ``trainer={"max_length": 512}``.

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
    if "data" not in sections and (recipe is None or (isinstance(recipe, dict) and "data" not in recipe)):
        sections["data"] = "none"
    return count_memory(
        build_recipe(recipe, sections),
        length=length,
        scored=scored,
        quantize=quantize,
        say=find_display(progress).say,
    )
