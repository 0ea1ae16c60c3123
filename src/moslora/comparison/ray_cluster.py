"""Cells run on a Ray cluster."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moslora.comparison.bench import Bench
from moslora.comparison.cell_files import begin, forget, keep, mark_crashed_cells
from moslora.comparison.cells import prepare_task, run_unkept
from moslora.comparison.plan import DECISIVE, Comparison, Engine, Planned
from moslora.comparison.progress import show_cell
from moslora.comparison.verdict import Cell
from moslora.compat.telemetry import no_telemetry
from moslora.errors import TrainingError, UsageError
from moslora.terminal import hide_known_warnings
from moslora.training.provenance import collect_versions
from moslora.training.stop import StopRequest

if TYPE_CHECKING:
    from moslora.display import Display


# Seconds after which it is said that a worker is awaited.
PATIENCE = 60.0


def import_ray() -> Any:
    """Import Ray, or say how to install it."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("engine=ray needs Ray: pip install 'moslora[cluster]'") from error
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

        # The cluster's environment is its own; this process is ours, and reports nothing while it lasts.
        self.unreported = no_telemetry()
        self.unreported.__enter__()
        torch.set_num_threads(threads)
        hide_known_warnings()
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


def run_on_ray(bench: Bench, groups: Sequence[Sequence[Planned]], engine: Engine) -> None:
    """Run cells on the cluster that Ray finds (``RAY_ADDRESS``, or one on this machine), or on a new local one."""
    ray = import_ray()
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
                        f"A worker cannot continue: {_last_line(error.cause or error)}"
                    ) from error
                idle.append(worker)
                for cell in cells:
                    keep(plan, cell)
                    rest -= 1
                    show_cell(plan, cell, rest, count, display)
    finally:
        for _, group in under_way.values():
            for cell in group:
                forget(plan, cell)


def _after_death(
    plan: Comparison, group: Sequence[Planned], display: Display
) -> tuple[int, list[list[Planned]]]:
    """Bury the cells in which a worker died too often, and return the others of its group, to be run one by one."""
    display.warn(f"A worker died in {len(group)} cells, perhaps out of memory; another one replaces it.")
    mark_crashed_cells(plan, display, group)
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
        raise TrainingError(f"A worker could not begin: {_last_line(error)}") from error
    differing = [
        f"{name} ({versions[name]} there)" for name in DECISIVE if versions[name] != expected[1][name]
    ]
    differing += [name for name in expected[0] if hashes.get(name) != expected[0][name]]
    if differing:
        raise TrainingError(
            f"A worker has another {', '.join(differing)} than this machine, so its numbers would not be comparable. "
            "Give all machines the same files at the same paths, and the same versions."
        )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
