"""Progress bars of trainers, which end with the training also where an exception ends it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["closing_bars"]


@contextlib.contextmanager
def closing_bars(*trainers: Any) -> Iterator[None]:
    """Close what the callbacks of trainers have open when the block ends.

    A trainer tells its callbacks of its end only where it ends by itself. A bar left open continues being drawn, hides
    the cursor, and is in the way of the next.

    Args:
        *trainers: Of transformers; their callbacks may have a method ``close``.
    """
    try:
        yield
    finally:
        for trainer in trainers:
            for callback in trainer.callback_handler.callbacks:
                close = getattr(callback, "close", None)
                if close is not None:
                    close()
