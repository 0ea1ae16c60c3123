"""Paths of this machine, taken out of what is published."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moslora.adapters.cards.base_name import bare_name, is_path

__all__ = ["scrub", "scrub_text"]

# An absolute path within a sentence; of a hub id, a URL or a fraction nothing is one.
_WITHIN = re.compile(
    r"(?<![\w:/.~\\>-])(?:~|[A-Za-z]:)?[\\/][^\s\"'`<>|:;,()\[\]{}]*[^\s\"'`<>|:;,()\[\]{}.]"
)


def scrub_text(text: str) -> str:
    """Return a text whose paths are only the names of what they lead to.

    Args:
        text: Any text.

    Example:
        >>> scrub_text("held against /home/ada/models/llama, r 1/2"), scrub_text("/home/ada/my base")
        ('held against llama, r 1/2', 'my base')
    """
    if is_path(text):
        return bare_name(text)
    return _WITHIN.sub(lambda found: bare_name(found[0].rstrip("/\\")), text)


def scrub(value: Any) -> Any:
    """Return a value of JSON without paths of this machine.

    Args:
        value: Texts in it are scrubbed, keys of mappings left as they are.
    """
    if isinstance(value, str):
        return scrub_text(value)
    if isinstance(value, Mapping):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value
