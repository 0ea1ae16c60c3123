"""From the words of a command line to arguments of the Python API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moslora.errors import UsageError

__all__ = ["names_in", "numbers_in", "split_arguments"]


def names_in(text: str) -> list[str]:
    """Split names separated by commas; empty if there are none."""
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_in(text: str, option: str, example: str, word: str | None = None) -> list[float] | None:
    """Split numbers separated by commas; None if there are none.

    Args:
        text: What was typed.
        option: Its name, for the message.
        example: Of what may be typed.
        word: May be typed instead, which the caller handles.

    Raises:
        UsageError: If a part is not a number.
    """
    try:
        return [float(part) for part in text.removesuffix(",").split(",")] if text.strip() else None
    except ValueError:
        pass
    if word is None:
        raise UsageError(f"{option} {text} is not a list of numbers, such as {example}.")
    raise UsageError(f"{option} {text} is neither a list of numbers, such as {example}, nor {word}.")


def split_arguments(arguments: Sequence[str], here: Path) -> tuple[str | None, list[str]]:
    """Split ``RECIPE|KEY=VALUE...`` into the recipe's path, None if there is none, and the settings over it."""
    from moslora.recipe.loading import split_arguments as split

    return split(arguments, here)
