"""A run's sign of life, for processes of other machines, which can see its files and nothing else."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["heartbeat"]

# Seconds between two signs; a run counts as alive for HEARTBEAT_SECONDS of run_directory.py after the last.
INTERVAL = 20.0


@contextlib.contextmanager
def heartbeat(record: Path, interval: float = INTERVAL) -> Iterator[None]:
    """Touch a run's record every now and then while the block runs, however long a step or a measurement takes.

    Args:
        record: Its ``run.json``; only its time changes.
        interval: Seconds.
    """
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(interval):
            with contextlib.suppress(OSError):  # as a file system that is away for a moment
                os.utime(record)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
