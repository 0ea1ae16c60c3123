"""A run's sign of life, for processes of other machines, which can see its files and nothing else.

The record names the process that holds the run. Whoever finds no sign of life for a while takes the run over, and then
the earlier holder, which may only have been cut off from the file system, ends: a run never has two writers for longer
than an interval.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from moslora.errors import UsageError
from moslora.terminal import print_error
from moslora.training.run_directory import RunDirectory

__all__ = ["heartbeat"]

# Seconds between two signs; a run counts as alive for HEARTBEAT_SECONDS of run_directory.py after the last.
INTERVAL = 20.0


def _end(run: RunDirectory) -> None:
    """End this process at once, as a kill would: whatever it wrote now would meet what another writes."""
    holder = run.read()
    print_error(
        f"{run.path} was taken over by process {holder.get('pid')} on {holder.get('host')}, as this one had given no "
        "sign of life for a while. This one ends."
    )
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def heartbeat(
    run: RunDirectory, interval: float = INTERVAL, lost: Callable[[RunDirectory], None] = _end
) -> Iterator[None]:
    """Touch a run's record every now and then while the block runs, however long a step or a measurement takes.

    Args:
        run: A run that this process holds; only the time of its record changes.
        interval: Seconds.
        lost: Called once if another process has taken the run over.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(interval):
            with contextlib.suppress(OSError, UsageError):  # as a file system that is away for a moment
                if not run.is_held():
                    lost(run)
                    return
                os.utime(run.record)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
