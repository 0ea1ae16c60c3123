"""Paths in a recipe: those that exist are made absolute."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moslora.recipe.schema import SHIPPED

__all__ = ["anchor", "user_path"]

PATHS: dict[str, tuple[str, ...]] = {
    "model": ("name", "tokenizer"),
    "data": ("train", "heldout", "images", "class_images", "subjects"),
    "task": ("prompts_file", "clip_model", "dino_model"),
    "adapter": ("start_from",),
    "mix": ("adapters",),
    "evaluation": ("also",),
}


def user_path(text: str) -> Path:
    """Return a path with ``~`` expanded."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path's raises for a user that does not exist


def anchor(section: str, values: Any, folders: Sequence[Path]) -> None:
    """Make paths that exist absolute, in place. Others stay: hub ids, or for the reader to complain about."""
    for key in PATHS.get(section, ()) if isinstance(values, dict) else ():
        value = values.get(key)
        if isinstance(value, list):
            # A folder that happens to be called general is given as ./general.
            named = (SHIPPED,) if key == "also" else ()
            values[key] = [item if item in named else _found_in_list(item, folders) for item in value]
        elif value is not None:
            values[key] = _found(value, folders)


def _found_in_list(item: Any, folders: Sequence[Path]) -> Any:
    """Return the path of one of several files, or the settings with it, as an absolute one."""
    if isinstance(item, dict) and "path" in item:
        return {**item, "path": _found(item["path"], folders)}
    return _found(item, folders)


def _found(value: Any, folders: Sequence[Path]) -> Any:
    """Return a path that exists as an absolute one, everything else as it is."""
    if not isinstance(value, str) or not value or "\0" in value:
        return value
    for folder in folders:
        place = folder / user_path(value)
        with contextlib.suppress(OSError):  # too long for a path, or not ours to look at
            if place.exists():
                return str(place.absolute())
    return value
