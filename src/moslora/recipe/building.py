"""Building a recipe in Python: a path, a mapping or a recipe, and sections over it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moslora import versions
from moslora.errors import RecipeError
from moslora.recipe.checking import check_recipe
from moslora.recipe.keys import SHORTHANDS
from moslora.recipe.loading import read_recipe_file
from moslora.recipe.overrides import expand_shorthands, override, replace_section
from moslora.recipe.paths import anchor
from moslora.recipe.schema import Recipe

__all__ = ["RecipeSource", "WholeSection", "build_recipe", "plain"]

# What a recipe is made from: a YAML file, its sections, or a recipe; None for the sections alone.
RecipeSource = str | os.PathLike[str] | Mapping[str, Any] | Recipe | None


class WholeSection(dict[str, Any]):
    """A section that replaces the recipe's, instead of being merged over it."""


def build_recipe(
    source: RecipeSource,
    *layers: Mapping[str, Any],
    settings: Sequence[str] = (),
    base: Path | None = None,
) -> Recipe:
    """Build a recipe, with the checks of ``load_recipe``.

    Args:
        source: A recipe's file, its sections, or a recipe.
        *layers: What goes over it, one after the other; by a section's name: a mapping is merged over the section, and
            a plain value has the shorthand meaning of the command line, as ``data="my.jsonl"``. None leaves the section
            as it is.
        settings: Over all of it, ``section.key=value`` as on the command line.
        base: The folder that stands for the current one.

    Returns:
        The recipe, with its defaults filled in. Paths that exist are absolute.

    Raises:
        RecipeError: If anything is wrong; all of it is named.
        VersionError: If PEFT, transformers or TRL is older than the tasks are written for.

    Example:
        >>> build_recipe({"model": "org/base", "data": "org/examples"}, {"adapter": {"r": 8}}).adapter["r"]
        8
    """
    versions.require_for_command()
    here = Path(base) if base is not None else Path.cwd()
    folders: tuple[Path, ...] = (here,)
    if isinstance(source, str | os.PathLike):
        path = here / os.path.expanduser(source)  # noqa: PTH111 - Path's raises for a user that does not exist
        values: Any = read_recipe_file(path)
        folders = (path.parent, here)
    elif isinstance(source, Recipe):
        values = source.sections(exclude_none=True)
    elif isinstance(source, Mapping | None):
        values = plain(source or {})
    else:
        raise RecipeError(
            f"recipe is a {type(source).__name__}; give a YAML file's path, a dict of sections, or a Recipe."
        )
    raw = expand_shorthands(values)
    for section, value in raw.items():
        anchor(section, value, folders)
    for section, given in ((name, value) for layer in layers for name, value in layer.items()):
        value = plain(given)
        if value is None:
            continue
        merges = isinstance(raw.get(section), dict) and not isinstance(given, WholeSection)
        if isinstance(value, dict) and merges:
            anchor(section, value, (here,))
            raw[section] = {**raw[section], **value}
        elif section in SHORTHANDS or isinstance(value, dict):
            replace_section(raw, section, value, here)
        else:
            raw[section] = value
    if isinstance(settings, str):
        raise RecipeError(f"settings={settings!r} is one text; give a list, as [{settings!r}].")
    if not raw and not settings:
        raise RecipeError("There is no recipe: give a YAML file, or at least model=… and data=….")
    problems: list[str] = []
    override(raw, settings, here, problems)
    return check_recipe(raw, here, problems)


def plain(value: Any) -> Any:
    """Return a value of Python as YAML would give it: paths as text, tuples and sets as lists."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
