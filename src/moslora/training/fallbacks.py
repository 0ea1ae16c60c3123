"""What the library logs where a fast path falls back to the slow one, shown to who trains."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["fallbacks_shown"]


class _Shown(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__(logging.INFO)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.say(record.getMessage())


@contextlib.contextmanager
def fallbacks_shown(display: Display) -> Iterator[None]:
    """Show the library's messages while the block runs, each reason once; Python shows only warnings by itself.

    Args:
        display: Where.
    """
    from moslora.core import notices

    logger, handler = logging.getLogger("moslora"), _Shown(display)
    level = logger.level
    notices.forget()  # what an earlier run of this process said, this one has to say again
    logger.addHandler(handler)
    logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
