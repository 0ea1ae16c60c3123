"""Where the cells of a comparison run: in this process, in several on this machine, or on a Ray cluster.

All of them leave the same: one file per cell, written whole. A cell that is finished is never run again, and one in
which a process died twice counts as crashed.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.comparison.cells import (
    DEATHS,
    DECISIVE,
    Bench,
    Comparison,
    Planned,
    begin,
    bury_dead,
    forget,
    in_groups,
    keep,
    prepare_task,
    read_cells,
    run_cells,
    run_unkept,
)
from moslora.comparison.methods import find_method
from moslora.comparison.verdict import Cell, foresee
from moslora.errors import TrainingError
from moslora.training.run import StopRequest
from moslora.training.run_directory import collect_hardware, collect_versions, write_whole

if TYPE_CHECKING:
    from moslora.display import Display
    from moslora.tasks.language import LanguageTask

__all__ = ["ENGINES", "Engine", "make_engine", "run_all"]


@dataclass(frozen=True)
class Engine:
    """How cells are run.

    Attributes:
        name: A key of ``ENGINES``.
        workers: Processes side by side; None for the engine's own choice.
        together: Cells that a process trains at once over one base, at most.
    """

    name: str = "local"
    workers: int | None = None
    together: int = 1


def make_engine(name: str, workers: int | None, together: int) -> Engine:
    """Check what was asked for.

    Args:
        name: A key of ``ENGINES``.
        workers: At least 1, or None.
        together: At least 1.

    Returns:
        The engine.

    Raises:
        ValueError: If there is no such engine, it cannot be used here, or a number is below 1.
    """
    if name not in ENGINES:
        raise ValueError(f"engine={name!r} is unknown; choose one of {', '.join(ENGINES)}.")
    for what, number in (("workers", workers), ("together", together)):
        if number is not None and number < 1:
            raise ValueError(f"{what}={number} must be at least 1.")
    if name == "ray":
        _import_ray()
    return Engine(name, workers, together)


def run_all(
    plan: Comparison, task: LanguageTask, display: Display, stop: StopRequest, engine: Engine
) -> None:
    """Run the cells that are not finished, and the base.

    Args:
        plan: What is compared.
        task: Its data, prepared.
        display: Where to tell of progress.
        stop: Asked between pieces of work.
        engine: Where and how.

    Raises:
        Stopped: If asked to stop.
        TrainingError: If the base cannot be brought back, or a worker cannot go on.
    """
    base = plan.directory / "cells" / "base.json"
    bury_dead(plan, display)
    left = [cell for cell in plan.cells if not plan.cell_file(*cell).exists()]
    if not left and base.exists():
        return
    stop.check()
    bench = Bench(plan, task, display, stop)
    _check_room(plan, bench, task.device)
    if not base.exists():
        write_whole(base, json.dumps(bench.measure_base()))
    ENGINES[engine.name](bench, in_groups(plan, left, engine.together), engine)


def _run_here(bench: Bench, groups: Sequence[Sequence[Planned]], engine: Engine) -> None:
    """Run cells in this process, or side by side in others."""
    workers = min(engine.workers or 1, len(groups))
    if workers > 1:
        plan, display, stop = bench.plan, bench.display, bench.stop
        bench.model = None
        _run_in_processes(plan, groups, display, stop, workers)
        return
    left = sum(map(len, groups))
    for group in groups:
        bench.stop.check()
        for cell in run_cells(bench, group):
            left -= 1
            _say_cell(bench.plan, cell, left, 1, bench.display)


def _say_cell(plan: Comparison, cell: Cell, left: int, workers: int, display: Display) -> None:
    """Tell of a finished cell; after the first how long the rest takes, after the first seeds what could be seen."""
    from statistics import fmean

    what = f"{cell.method}, rate {cell.learning_rate:g}, seed {cell.seed}"
    if cell.validation is not None and cell.test is not None:
        display.say(
            f"{what}: validation loss {fmean(cell.validation):.4f}, held out {fmean(cell.test):.4f}; "
            f"{cell.cell_seconds:.0f} s."
        )
    else:
        display.warn(f"{what} {cell.status}: {cell.reason}.")
    done = read_cells(plan)
    if left:
        mean = fmean([c.cell_seconds for c in done if c.cell_seconds] or [0.0])
        display.say(f"  {left} cells left, about {_duration(mean * left / workers)}.")
    first = [c for c in done if (c.method, c.learning_rate) == (plan.baseline, plan.cells[0][1])]
    if len(first) == len(plan.seeds) and cell in first:
        size = foresee(first, len(plan.seeds), len(plan.methods) - 1)
        if size is not None:
            display.say(
                f"By the spread of {plan.baseline}'s seeds, this comparison can show a difference in held-out loss of "
                f"about {size:.2g}, four times out of five; of less if seeds move the methods alike. For a smaller "
                "one take more seeds (--seeds) or examples (--examples)."
            )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _check_room(plan: Comparison, bench: Bench, device: str) -> None:
    """Refuse to train the whole model where its gradients and Adam's two moments do not fit."""
    if not any(method.library == "none" for method in plan.methods):
        return
    needed = sum(p.numel() * p.element_size() for p in bench.model.parameters()) * 3
    if device.startswith("cuda"):
        import torch

        free = int(torch.cuda.mem_get_info()[0])
    else:
        import psutil

        free = int(psutil.virtual_memory().available)
    if needed > free:
        raise ValueError(
            f"Method full needs about {needed / 1e9:.1f} GB beside the base, and {free / 1e9:.1f} GB are free. Leave "
            "it out of --methods."
        )


# --- In several processes -----------------------------------------------------------------------------------

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
    about = dataclasses.replace(plan, methods=())
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
                    _say_cell(plan, cell, rest, workers, display)
            if stop.received is not None:
                display.say("Waiting for the cells under way.")
                pool.shutdown(wait=True, cancel_futures=True)
                stop.check()
    except BrokenProcessPool as broken:
        raise TrainingError(
            "A worker process died, perhaps for want of memory. Run the same command with fewer --workers; finished "
            f"cells are kept, and a cell in which a process dies {DEATHS} times counts as crashed."
        ) from broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(plan: Comparison, threads: int) -> None:
    global _bench
    import torch

    from moslora.display import Display

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides; a cell under way is finished
    torch.set_num_threads(threads)
    display = Display(quiet=True)
    stop = StopRequest(display)
    _bench = Bench(plan, prepare_task(plan, display, stop.check), display, stop)


def _run_in_worker(cells: Sequence[tuple[str, float, int]]) -> list[Cell]:
    assert _bench is not None
    return run_cells(_bench, [(find_method(name), rate, seed) for name, rate, seed in cells])


# --- On a Ray cluster ---------------------------------------------------------------------------------------


# Seconds after which it is said that a worker is awaited.
PATIENCE = 60.0


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError("engine=ray needs Ray: pip install 'moslora[cluster]'") from error
    return ray


class _RayWorker:
    """A process of the cluster with a base of its own. It keeps nothing: results go back to who asked.

    Args:
        plan: What is compared; its folder need not be there.
        threads: For torch.
    """

    def __init__(self, plan: Comparison, threads: int) -> None:
        import torch

        from moslora.display import Display

        torch.set_num_threads(threads)
        self.scratch = tempfile.TemporaryDirectory(prefix="moslora-")
        own = dataclasses.replace(plan, directory=Path(self.scratch.name))
        display = Display(quiet=True)
        stop = StopRequest(display)
        task = prepare_task(own, display, stop.check)
        self.hashes = task.hashes()
        self.bench = Bench(own, task, display, stop)

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the hashes of what it found, and its versions."""
        return self.hashes, collect_versions()

    def run(self, cells: Sequence[Planned]) -> list[Cell]:
        """Run cells, at once if they can be."""
        return run_unkept(self.bench, cells)


def _run_on_ray(bench: Bench, groups: Sequence[Sequence[Planned]], engine: Engine) -> None:
    """Run cells on the cluster that Ray finds (``RAY_ADDRESS``, or one on this machine), or on a new local one."""
    ray = _import_ray()
    plan, display, stop = bench.plan, bench.display, bench.stop
    expected = bench.task.hashes(), collect_versions()
    bench.model = None
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
    workers: list[Any] = []
    try:
        there = ray.cluster_resources()
        gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 1))
        count = min(engine.workers or gpus or 1, len(groups))
        # No node can give more than it has, however many there are.
        largest = max(
            (int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]), default=1
        )
        threads = max(1, min(cores // count, largest))
        # A worker on the CPU takes what is its share; one with a GPU needs little else.
        needs = {"num_gpus": min(1.0, gpus / count), "num_cpus": 1} if gpus else {"num_cpus": threads}
        make = ray.remote(**needs)(_RayWorker).remote

        def enlist(many: int = 1) -> list[Any]:
            new = [make(plan, threads) for _ in range(many)]  # side by side
            workers.extend(new)
            for worker in new:
                _check_worker(ray, worker, expected, display, stop)
            return new

        display.say(f"Ray: {count} workers with {', '.join(f'{k} {v:g}' for k, v in needs.items())} each.")
        _feed(ray, plan, [list(group) for group in groups], enlist(count), enlist, display, stop, count)
    finally:
        for worker in workers:
            ray.kill(worker)
        if ours:
            ray.shutdown()


def _feed(
    ray: Any,
    plan: Comparison,
    waiting: list[list[Planned]],
    idle: list[Any],
    enlist: Callable[[], list[Any]],
    display: Display,
    stop: StopRequest,
    count: int,
) -> None:
    """Hand groups of cells to workers until none is left; replace a worker that dies."""
    rest = sum(map(len, waiting))
    under_way: dict[Any, tuple[Any, list[Planned]]] = {}
    told = False
    try:
        while waiting or under_way:
            while idle and waiting and stop.received is None:
                group = waiting.pop(0)
                worker = idle.pop()
                for cell in group:
                    begin(plan, cell)
                under_way[worker.run.remote(group)] = worker, group
            if stop.received is not None:
                if not told:
                    display.say("Waiting for the cells under way.")
                    told = True
                if not under_way:
                    stop.check()
            ready, _ = ray.wait(list(under_way), timeout=0.5)
            for answer in ready:
                worker, group = under_way.pop(answer)
                try:
                    cells = ray.get(answer)
                except ray.exceptions.RayActorError:
                    found, again = _after_death(plan, group, display)
                    waiting[:0] = again
                    rest -= found
                    if waiting:
                        idle += enlist()
                    continue
                except ray.exceptions.RayTaskError as error:
                    raise TrainingError(
                        f"A worker cannot go on: {_first_line(error.cause or error)}"
                    ) from error
                idle.append(worker)
                for cell in cells:
                    keep(plan, cell)
                    rest -= 1
                    _say_cell(plan, cell, rest, count, display)
    finally:
        for _, group in under_way.values():
            for cell in group:
                forget(plan, cell)


def _after_death(
    plan: Comparison, group: Sequence[Planned], display: Display
) -> tuple[int, list[list[Planned]]]:
    """Bury the cells in which a worker died too often, and return the others of its group, to be run one by one."""
    display.warn(f"A worker died in {len(group)} cells, perhaps for want of memory; another takes its place.")
    bury_dead(plan, display, group)
    again = [[cell] for cell in group if not plan.cell_file(*cell).exists()]
    return len(group) - len(again), again


def _check_worker(
    ray: Any,
    worker: Any,
    expected: tuple[dict[str, Any], dict[str, Any]],
    display: Display,
    stop: StopRequest,
) -> None:
    """Refuse a worker that found another base, other data or other versions than were found here.

    Raises:
        TrainingError: With what differs, or with what went wrong as it began.
        Stopped: If asked to stop while it is not there yet.
    """
    answer = worker.describe.remote()
    waited = 0.0
    while not ray.wait([answer], timeout=0.5)[0]:
        stop.check()
        waited += 0.5
        if waited == PATIENCE:
            display.say(
                "Still waiting for a worker: it loads the base, or the cluster has no room for it yet."
            )
    try:
        hashes, versions = ray.get(answer)
    except ray.exceptions.RayError as error:
        raise TrainingError(f"A worker could not begin: {_first_line(error)}") from error
    differing = [
        f"{name} ({versions[name]} there)" for name in DECISIVE if versions[name] != expected[1][name]
    ]
    differing += [name for name in expected[0] if hashes.get(name) != expected[0][name]]
    if differing:
        raise TrainingError(
            f"A worker has another {', '.join(differing)} than this machine, so its numbers would not be comparable. "
            "Give all machines the same files at the same paths, and the same versions."
        )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


ENGINES: dict[str, Callable[[Bench, Sequence[Sequence[Planned]], Engine], None]] = {
    "local": _run_here,
    "ray": _run_on_ray,
}
