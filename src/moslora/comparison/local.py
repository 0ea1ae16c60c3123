"""Cells run in this process, or side by side in several of this machine."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moslora.comparison.bench import Bench
from moslora.comparison.cell_files import DEATHS
from moslora.comparison.cells import prepare_task, run_cells
from moslora.comparison.methods import find_method
from moslora.comparison.plan import Comparison, Engine, Planned
from moslora.comparison.progress import show_cell
from moslora.comparison.verdict import Cell
from moslora.errors import TrainingError
from moslora.terminal import hide_known_warnings
from moslora.training.provenance import collect_hardware
from moslora.training.stop import StopRequest

if TYPE_CHECKING:
    from moslora.display import Display


def run_local(bench: Bench, groups: Sequence[Sequence[Planned]], engine: Engine) -> None:
    """Run cells in this process, or side by side in others."""
    workers = min(engine.workers or 1, len(groups))
    if workers > 1:
        plan, display, stop = bench.plan, bench.display, bench.stop
        bench.model = None
        _run_in_processes(plan, groups, display, stop, workers)
        return
    bench.make_ready()
    left = sum(map(len, groups))
    for group in groups:
        bench.stop.check()
        for cell in run_cells(bench, group):
            left -= 1
            show_cell(bench.plan, cell, left, 1, bench.display)


_bench: Bench | None = None  # of this process


def _run_in_processes(
    plan: Comparison,
    groups: Sequence[Sequence[Planned]],
    display: Display,
    stop: StopRequest,
    workers: int,
) -> None:
    """Run cells side by side, each process with its own copy of the base and its share of the cores."""
    import multiprocessing
    from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool

    threads = max(1, collect_hardware()["cores"] // workers)
    about = dataclasses.replace(plan, methods=(), confirmed=())  # methods cannot be pickled
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(about, threads),
    )
    try:
        waiting = {
            pool.submit(_run_in_worker, [(m.origin or m.name, rate, seed) for m, rate, seed in group]): group
            for group in groups
        }
        rest = sum(map(len, groups))
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in done:
                waiting.pop(future)
                for cell in future.result():
                    rest -= 1
                    show_cell(plan, cell, rest, workers, display)
            if stop.received is not None:
                display.say("Waiting for the cells under way.")
                pool.shutdown(wait=True, cancel_futures=True)
                stop.check()
    except BrokenProcessPool as broken:
        raise TrainingError(
            "A worker process died, perhaps out of memory. Run the same command with fewer --workers; finished "
            f"cells are kept, and a cell in which a process dies {DEATHS} times counts as crashed."
        ) from broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(plan: Comparison, threads: int) -> None:
    global _bench
    import torch

    from moslora.display import Display

    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a cell under way is finished
    torch.set_num_threads(threads)
    hide_known_warnings()
    display = Display(quiet=True)
    stop = StopRequest(display)
    _bench = Bench(plan, prepare_task(plan, display, stop.check), display, stop)


def _end_with_parent() -> None:
    """End when the process that hands out the cells dies: nobody would take what comes of them."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    assert parent is not None, "it runs in workers alone"
    wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(cells: Sequence[tuple[str, float, int]]) -> list[Cell]:
    assert _bench is not None
    return run_cells(_bench, [(find_method(name), rate, seed) for name, rate, seed in cells])
