"""Work on parts of a data set in several processes, results in order, with an ear for requests to stop."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from moslora.display import Display
from moslora.errors import TrainingError

__all__ = ["Workers", "count_cores"]

T = TypeVar("T")
R = TypeVar("R")
PARALLELISM = "TOKENIZERS_PARALLELISM"
POLL = 0.5  # seconds between looks for a request to stop
AHEAD = 2  # parts that are handed out before they are needed, for each process
# What a process of the pool does, and whether nobody wants it any more.
_work: Callable[[Any, Callable[[], None]], Any] | None = None
_given_up: Any = None


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """The processes that prepare data.

    Attributes:
        processes: How many; one works in this process.
        display: Where progress is shown.
        check: Called between parts; raises if the run was asked to stop.
    """

    processes: int
    display: Display
    check: Callable[[], None]

    def run(
        self,
        label: str,
        work: Callable[[T, Callable[[], None]], R],
        parts: Sequence[T],
        sizes: Sequence[int],
    ) -> Iterator[R]:
        """Do the work of each part.

        Args:
            label: What is done, for the progress display.
            work: From a part to its result. It runs in a copy of this process, and may read what it closes over. It is
                given what it has to call now and then, which raises if the result is not wanted any more.
            parts: What is worked on.
            sizes: How large each part is, for the progress display.

        Yields:
            The results, in order.

        Raises:
            TrainingError: If a process died.
        """
        with self.display.progress(label, sum(sizes)) as progress:
            processes = min(self.processes, len(parts))
            # Copies of a process know what it knows; where there is no fork, one process does the work.
            if processes < 2 or not sys.platform.startswith("linux"):
                results: Iterator[R] = (work(part, self.check) for part in parts)
            else:
                results = self._in_processes(work, parts, processes)
            for size in sizes:
                self.check()
                yield next(results)
                progress.advance(size)

    def _in_processes(
        self, work: Callable[[T, Callable[[], None]], R], parts: Sequence[T], processes: int
    ) -> Iterator[R]:
        from concurrent.futures import ProcessPoolExecutor, TimeoutError
        from concurrent.futures.process import BrokenProcessPool

        context = multiprocessing.get_context("fork")
        given_up = context.Event()
        pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(work, given_up))
        waiting: deque[Any] = deque()
        rest = iter(parts)
        try:
            while True:
                while len(waiting) < AHEAD * processes and (part := next(rest, None)) is not None:
                    with _tokenizers_alone():  # the first one starts all processes
                        waiting.append(pool.submit(_call, part))
                if not waiting:
                    return
                try:
                    result = waiting[0].result(timeout=POLL)
                except TimeoutError:
                    self.check()
                    continue
                waiting.popleft()
                yield result
        except BrokenProcessPool as broken:
            raise TrainingError(
                f"One of {processes} processes that prepare the data died, perhaps out of memory. Run the same command "
                "with fewer: trainer.dataset_num_proc=1. Nothing half-written was left."
            ) from broken
        finally:
            given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _tokenizers_alone() -> Iterator[None]:
    """Keep tokenizers from threads of their own in copies of this process, of which they would warn."""
    if PARALLELISM in os.environ:
        yield
        return
    os.environ[PARALLELISM] = "false"  # the processes are the parallelism
    try:
        yield
    finally:
        os.environ.pop(PARALLELISM, None)


def _start(work: Callable[[Any, Callable[[], None]], Any], given_up: Any) -> None:
    global _work, _given_up
    _work, _given_up = work, given_up
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End when the process that hands out the parts dies: nobody would take what comes of them."""
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None, "it runs in workers alone"
    wait([parent.sentinel])
    os._exit(1)


def _call(part: Any) -> Any:
    assert _work is not None
    return _work(part, _check)


def _check() -> None:
    if _given_up.is_set():
        raise TrainingError("The result is not wanted any more.")
