"""Messages that are logged once in a process, because hundreds of layers have the same reason for them."""

from __future__ import annotations

import logging

import torch

__all__ = ["forget", "tell_once"]

_told: set[tuple[str, str]] = set()


def tell_once(logger: logging.Logger, message: str, reason: str) -> None:
    """Log a message, unless it was logged before with this reason. Nothing happens while torch compiles.

    Args:
        logger: Where it is logged, at level INFO.
        message: With one ``%s`` for the reason.
        reason: Why, as the end of a sentence without its period.
    """
    if not torch.compiler.is_compiling() and (message, reason) not in _told:
        _told.add((message, reason))
        logger.info(message, reason)


def forget() -> None:
    """Forget what was logged, so that it is logged again."""
    _told.clear()
