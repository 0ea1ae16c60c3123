"""Ctrl-C and SIGTERM: remembered until the run reaches a place from which it can be resumed."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from moslora.distributed import Team
from moslora.errors import Stopped

if TYPE_CHECKING:
    from moslora.display import Display

__all__ = ["StopRequest"]


class StopRequest:
    """Remembers Ctrl-C and SIGTERM until the run reaches a place where it can continue later.

    Used as a context manager it takes the two signals over. The second one ends the run at once.

    Args:
        display: Told of a request, at the next place where the run asks for one.
        team: The processes of the run.
    """

    def __init__(self, display: Display, team: Team | None = None) -> None:
        self.display = display
        self.team = team or Team()
        self.received: int | None = None
        # Whether all processes of the team come by every place that asks, so that they can stop at the same one.
        self.in_step = False
        self._said = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number  # nothing is written here: the signal may have come in the middle of a write

    def _say(self) -> None:
        if self.received is not None and not self._said:
            self._said = True
            self.display.say("Stopping at the next safe place. Once more stops at once.", style="yellow")

    def check(self) -> None:
        """Stop here if asked to; of several processes all, where they are in step, and otherwise the first alone.

        Raises:
            Stopped: If a signal came in.
        """
        if self.in_step:
            if number := self.agreed():
                raise Stopped(number)
            return
        self._say()
        if self.received is not None and self.team.is_main_process:
            raise Stopped(self.received)

    def agreed(self) -> int | None:
        """Return the signal that any of the run's processes was sent; all of them have to ask at the same place."""
        self._say()
        return self.team.maximum(self.received or 0) or None
