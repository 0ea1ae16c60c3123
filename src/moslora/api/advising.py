"""Advice on a recipe: what to try, why, and who says so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.api.objects import take_objects
from moslora.api.planning import leaves_data_out
from moslora.display import Display, Silence, find_display
from moslora.failures import verb
from moslora.recipe.building import RecipeSource, build_recipe
from moslora.recipe.loading import read_recipe_file
from moslora.recipe.overrides import expand_shorthands
from moslora.recipe.schema import Recipe

if TYPE_CHECKING:
    from moslora.advice.advise import Advice

__all__ = ["advise"]


@verb("advise")
def advise(
    recipe: RecipeSource = None,
    *,
    settings: Sequence[str] = (),
    progress: str | Display | None = None,
    **sections: Any,
) -> Advice:
    """Hold a recipe against what is known of learning rate, rank, batch, targets, length and scale.

    No weights are loaded. The data are read and encoded where they are named; what is not at hand is said.

    Args:
        recipe: A recipe's path, a dict of its sections or a ``Recipe``; data may be left out.
        settings: Over all of it, ``section.key=value`` as on the command line.
        progress: None for silence, ``"terminal"`` or ``"notebook"``.
        **sections: Sections and objects as for ``train``.

    Returns:
        The advice: ``recommendations``, each with its reason, source and dissent, and ``overrides``, ready for
        ``settings`` or the command line. Its ``repr`` is the table.

    Raises:
        RecipeError: If the recipe is wrong.

    Example:
        >>> advice = moslora.advise(model="base-model", data="data.jsonl", adapter={"target_modules": ["q_proj"]})
        >>> [setting for setting in advice.overrides if "target" in setting]
        ['adapter.target_modules=all-linear']
    """
    from moslora.advice.advise import advise_on
    from moslora.advice.situation import NO_DATA, situation_of
    from moslora.tasks import find_task

    layers, handed_over = take_objects(**sections)
    given = _given(recipe, layers, settings)
    if leaves_data_out(recipe, layers, settings) and not handed_over.needs_files:
        layers.append({"data": NO_DATA})
    built = build_recipe(recipe, *layers, settings=settings)
    say = find_display(progress).say
    with _folder(handed_over.needs_files) as folder:
        if handed_over.needs_files:
            built = handed_over.write(folder, built, Silence(), weights=False)
        task = find_task(built.task.kind)(built, _Quiet(), lambda: None)
        handed_over.put_into(task)
        say(
            f"Reading {built.model.name}'s configuration{'' if built.data.train == NO_DATA else ' and the data'} …"
        )
        situation = situation_of(built, given, task)
    target = os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else ""
    advice = advise_on(situation, target)
    return _with_settings(advice, settings) if settings else advice


class _Quiet(Display):
    """Shows nothing, warnings included: they are about a training, which is not asked for."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), quiet=True)

    def warn(self, text: str) -> None:
        """Say nothing."""


def _with_settings(advice: Advice, settings: Sequence[str]) -> Advice:
    """Name the settings of the command line, too, in what is to be pasted."""
    replaced = {one.partition("=")[0] for one in advice.overrides}
    kept = [setting for setting in settings if setting.partition("=")[0] not in replaced]
    return dataclasses.replace(advice, settings=tuple(kept))


@contextlib.contextmanager
def _folder(is_needed: bool) -> Iterator[Path]:
    if not is_needed:
        yield Path()
        return
    with tempfile.TemporaryDirectory(prefix="moslora-advise-") as folder:
        yield Path(folder)


def _given(
    recipe: RecipeSource, layers: Sequence[Mapping[str, Any]], settings: Sequence[str]
) -> frozenset[str]:
    """Return the settings that a recipe names itself, as ``section.key``."""
    if isinstance(recipe, Recipe):
        values: Any = recipe.model_dump(exclude_unset=True)
    elif isinstance(recipe, str | os.PathLike):
        values = expand_shorthands(read_recipe_file(Path(os.path.expanduser(recipe))))  # noqa: PTH111
    else:
        values = dict(recipe or {})
    named = {setting.partition("=")[0].strip() for setting in settings}
    for layer in (values, *layers):
        for section, content in layer.items():
            if isinstance(content, Mapping):
                named |= {f"{section}.{key}" for key in content}
    return frozenset(named)
