"""What a record of a run or a comparison names as its command: the function that was called, or the command line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

__all__ = ["called_as", "command_or"]

_COMMAND: ContextVar[str | None] = ContextVar("command", default=None)


@contextlib.contextmanager
def called_as(command: str) -> Iterator[None]:
    """Record this command line for what is called within the block.

    Args:
        command: As it was typed.
    """
    token = _COMMAND.set(command)
    try:
        yield
    finally:
        _COMMAND.reset(token)


def command_or(function: str) -> str:
    """Return the command line of the block of ``called_as``; outside of one, the function's name.

    Args:
        function: Such as ``"moslora.train"``.
    """
    return _COMMAND.get() or function
