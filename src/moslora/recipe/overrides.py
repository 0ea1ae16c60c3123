"""Shorthands, and the ``section.key=value`` overrides of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml.reader import Reader

from moslora.errors import RecipeError
from moslora.recipe.data_section import Name, Sources
from moslora.recipe.keys import BELONGING, SHORTHANDS
from moslora.recipe.paths import anchor, user_path
from moslora.recipe.schema import SECTIONS_OF, Recipe
from moslora.recipe.yaml_core import parse_yaml

__all__ = ["expand_shorthands", "override"]


def expand_shorthands(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Replace shorthands and empty sections by what they stand for."""
    return {section: _expanded(section, value) for section, value in raw.items()}


def _expanded(section: str, value: Any) -> Any:
    if value is None and section in {*Recipe.model_fields, "scopes"} and section not in ("seed", "mix"):
        return {}
    if section == "data" and isinstance(value, list):
        return {SHORTHANDS[section]: value}  # several files
    if section not in SHORTHANDS or not isinstance(value, str):
        return value
    if section == "output" and "/" in value:
        path = user_path(value)
        return {"dir": str(path.parent), "name": path.name}
    return {SHORTHANDS[section]: value}


def override(raw: dict[str, Any], arguments: Sequence[str], here: Path, problems: list[str]) -> None:
    """Apply ``key=value`` arguments in place, whole sections first."""
    settings: list[tuple[str, Any]] = []
    for argument in arguments:
        place, equals, text = argument.partition("=")
        if not equals or not all(part and part == part.strip() for part in place.split(".")):
            problems.append(
                f"{argument!r} is not a setting; write section.key=value, after one recipe file at most."
            )
            continue
        try:
            # YAML has no place for control characters, which names of files may have: that is a text as it stands.
            value = text if Reader.NON_PRINTABLE.search(text) else parse_yaml(text, place)
        except RecipeError as error:
            problems.extend(error.problems)
            continue
        # What reads as a number may still be a name, as a commit hash of digits is.
        settings.append((place, text if isinstance(value, int | float) and _is_text(place) else value))
    for place, value in sorted(settings, key=lambda setting: "." in setting[0]):
        section, _, key = place.partition(".")
        if not key:
            replace_section(raw, section, value, here)
        elif isinstance(single := set_key(raw, place, value), dict):
            if "." not in key:
                anchor(section, single, (here,))
        else:
            problems.append(f"{place} cannot be set, because its section is the single value {single!r}.")


def set_key(raw: dict[str, Any], place: str, value: Any) -> Any:
    """Set ``section.key`` or ``section.key.rest`` in place, and return the mapping that holds it.

    A module's name has dots of its own, so there are three parts at most:
    ``adapter.rank_pattern.model.layers.0.q_proj``. If a part on the way has a single value, that is returned.
    """
    *outer, last = place.split(".", 2)
    values: Any = raw
    for key in outer:
        if not isinstance(values, dict):
            return values
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
    if isinstance(values, dict):
        values[last] = value
    return values


def replace_section(raw: dict[str, Any], section: str, value: Any, here: Path) -> None:
    """Set a section in place. A shorthand keeps the section's other keys, but those that belong to the old value."""
    new, old = _expanded(section, value), raw.get(section)
    anchor(section, new, (here,))
    is_short = isinstance(value, str) or (section == "data" and isinstance(value, list))
    if is_short and section in SHORTHANDS and isinstance(old, dict):
        new = {**{key: old[key] for key in old if key not in BELONGING[section]}, **new}
    raw[section] = new


def _is_text(place: str) -> bool:
    """Whether a place of the recipe's own sections takes a text."""
    section, _, key = place.partition(".")
    key = key or SHORTHANDS.get(section, "")
    fields = [
        sections[section].model_fields[key]
        for sections in SECTIONS_OF.values()
        if section in sections and key in sections[section].model_fields
    ]
    texts = (str, Name, Name | None, str | None, Sources, Sources | None)
    return bool(fields) and all(field.annotation in texts for field in fields)
