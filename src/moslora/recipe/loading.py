"""Reading a recipe: the file, its shorthands, paths, and ``section.key=value`` overrides."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora import versions
from moslora.bounded import kind_of_file
from moslora.errors import RecipeError
from moslora.recipe.checking import check_recipe
from moslora.recipe.overrides import expand_shorthands, override
from moslora.recipe.paths import anchor, user_path
from moslora.recipe.schema import Recipe
from moslora.recipe.yaml_core import parse_yaml
from moslora.wording import nearest

__all__ = ["load_recipe", "read_recipe_file", "split_arguments"]

PATIENCE = 10.0  # seconds that a pipe has to give a recipe
LARGEST_RECIPE = 1 << 20  # bytes; somebody who names a data file or a model is told so


def load_recipe(arguments: Sequence[str], base: Path | None = None) -> Recipe:
    """Read a recipe as the command line gives it.

    Args:
        arguments: An optional path of a YAML file (anything without ``=``), then overrides,
            ``section.key=value`` or ``section=value``. Values are YAML: ``1e-3``, ``[q_proj, v_proj]``,
            ``null``. A shorthand as ``data=new.jsonl`` also forgets what belonged to the old value, such as
            its held-out file.
        base: The folder that stands for the current one.

    Returns:
        The recipe, with its defaults filled in. Paths that exist are absolute: those in a file are looked
        for beside that file, then in the current folder; those of overrides in the current folder.

    Raises:
        RecipeError: If anything is wrong; all of it is named.
        VersionError: If PEFT, transformers or TRL is older than the command's tasks are written for.
    """
    versions.require_for_command()
    here = Path(base) if base is not None else Path.cwd()
    if not arguments:
        raise RecipeError("There is no recipe: give a YAML file, or at least model=… and data=….")
    raw: dict[str, Any] = {}
    name, settings = split_arguments(arguments, here)
    if name is not None:
        path = here / user_path(name)
        raw = expand_shorthands(read_recipe_file(path))
        for section, values in raw.items():
            anchor(section, values, (path.parent, here))
    problems: list[str] = []
    override(raw, settings, here, problems)
    return check_recipe(raw, here, problems)


def split_arguments(arguments: Sequence[str], here: Path) -> tuple[str | None, list[str]]:
    """Split a command line's arguments into the recipe's path and the settings over it.

    Args:
        arguments: As of ``load_recipe``.
        here: The current folder.

    Returns:
        The path, which is None if the first argument is a setting, and the settings.
    """
    if arguments and ("=" not in arguments[0] or (here / arguments[0]).is_file()):
        return arguments[0], list(arguments[1:])
    return None, list(arguments)


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read a recipe file into its sections; nothing in them is checked.

    Args:
        path: A YAML file.

    Raises:
        RecipeError: If it cannot be read, or is not a mapping.
    """
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".yaml", ".yml"))
        hint = f" Did you mean {path / inside[0]}?" if inside else " Give the YAML file."
        raise RecipeError(f"{path} is a folder, not a recipe.{hint}")
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, siblings)
        hint = f"Did you mean {path.parent / near}?" if near else "A setting is written key=value."
        raise RecipeError(f"{path} does not exist. {hint}")
    try:
        head = _read_start(path)
        text = head.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text or len(head) > LARGEST_RECIPE:
        what = "is a binary file" if "\0" in text else "has more than 1 MiB"
        raise RecipeError(
            f"{path} {what}, so it is not a recipe. Name data as data=… and a model as model=…."
        )
    value = parse_yaml(text, str(path))
    if value is None:
        raise RecipeError(f"{path} is empty. A recipe needs at least model: … and data: ….")
    if not isinstance(value, dict):
        what = "a list" if isinstance(value, list) else f"the single value {value!r}"
        raise RecipeError(f"{path} holds {what}; a recipe has sections: {', '.join(Recipe.model_fields)}.")
    return value


def _read_start(path: Path) -> bytes:
    """Read a file up to one byte more than a recipe may have; a pipe, as of ``<(command)``, has a time limit."""
    kind = kind_of_file(path)
    if kind in ("a device", "a socket"):
        raise RecipeError(f"{path} is {kind}, not a recipe. Give the YAML file.")
    if kind != "a named pipe":
        with path.open("rb") as file:
            return file.read(LARGEST_RECIPE + 1)
    content, deadline = b"", time.monotonic() + PATIENCE
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        while time.monotonic() < deadline and len(content) <= LARGEST_RECIPE:
            piece = pipe.read(
                1 << 16
            )  # None while a writer has nothing to say; empty before one comes, and at the end
            if content and piece == b"":
                return content
            content += piece or b""
            if not piece:
                time.sleep(0.02)
    if len(content) > LARGEST_RECIPE:
        return content
    raise RecipeError(f"{path} is a pipe that gave no whole recipe in {PATIENCE:.0f} s. Give a YAML file.")
