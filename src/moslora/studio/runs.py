"""Runs, comparisons and adapters below a folder, as a page shows them; files that did not change are not read again."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from moslora.bounded import read_json
from moslora.errors import MoSLoRAError, NotFoundError, UsageError
from moslora.files import remove
from moslora.studio.workspace import Workspace
from moslora.training.run_directory import RunDirectory, is_alive

__all__ = ["Found", "Library", "Metrics", "RunState"]

# Seconds for which a walk over the folders is good; pages ask every other second.
FRESH = 1.5
# Points of a curve that are kept; beyond that neighbors are averaged, as in a report.
MOST_POINTS = 1200
STATUS_WORDS = {
    "running": "running",
    "completed": "completed",
    "interrupted": "stopped",
    "failed": "failed",
    "ended": "ended without a word",
}


@dataclass
class Metrics:
    """A ``metrics.jsonl`` that grows, read from where it was read to.

    Attributes:
        losses, held_out, rates: Points of step and value.
        step, epoch: Of the last line.
        lost: How many values were not finite.
    """

    path: Path
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    rates: list[tuple[int, float]] = field(default_factory=list)
    step: int = 0
    epoch: float | None = None
    lost: int = 0
    place: int = 0
    identity: tuple[int, int] = (0, 0)

    def update(self) -> bool:
        """Read what was added; return whether there was anything.

        A file that became shorter, or another one, is read from the start: a resumed run drops lines.
        """
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if identity != self.identity or stat.st_size < self.place:
                    self._forget(identity)
                if stat.st_size == self.place:
                    return False
                file.seek(self.place)
                content = file.read()
        except OSError:
            return False
        whole, end, _ = content.rpartition(b"\n")  # a torn last line is read when it is whole
        self.place += len(whole) + len(end)
        for line in whole.split(b"\n"):
            self._take(line)
        return bool(whole)

    def _forget(self, identity: tuple[int, int]) -> None:
        self.losses, self.held_out, self.rates = [], [], []
        self.step, self.epoch, self.lost, self.place, self.identity = 0, None, 0, 0, identity

    def _take(self, line: bytes) -> None:
        try:
            values = json.loads(line)
        except ValueError:
            return  # the report says which line is damaged
        if not isinstance(values, dict) or not isinstance(step := values.get("step"), int):
            return
        self.step = max(self.step, step)
        if isinstance(epoch := values.get("epoch"), int | float):
            self.epoch = float(epoch)
        self.lost += len(values.get("not_finite") or ())
        for key, points in (
            ("loss", self.losses),
            ("eval_loss", self.held_out),
            ("learning_rate", self.rates),
        ):
            value = values.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                points.append((step, float(value)))

    def lines(self) -> list[dict[str, Any]]:
        """Return the points as lines of a log, few enough to be drawn."""
        found: list[dict[str, Any]] = []
        for key, points in (
            ("loss", self.losses),
            ("eval_loss", self.held_out),
            ("learning_rate", self.rates),
        ):
            found += [{"step": step, key: value} for step, value in thinned(points)]
        return found


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """Return at most so many points: means of neighbors, the last point as it is.

    Args:
        points: Of step and value, in order.
        most: How many.
    """
    if len(points) <= most:
        return list(points)
    stride = -(-len(points) // (most - 1))
    groups = [points[start : start + stride] for start in range(0, len(points), stride)]
    means = [(round(sum(x for x, _ in g) / len(g)), sum(y for _, y in g) / len(g)) for g in groups]
    return [*means[:-1], points[-1]]


@dataclass(frozen=True)
class RunState:
    """A run at a moment.

    Attributes:
        path: Its directory.
        name: From the page's folder on.
        record: Its ``run.json``; empty if that is damaged.
        status: A key of ``STATUS_WORDS``: of a process that is gone without a word ``"ended"``.
        problem: Why the record cannot be read; empty if it can.
        step: Optimizer steps done.
        steps: Steps in all; None where that is not known yet.
        loss: The last one of training.
    """

    path: Path
    name: str
    record: Mapping[str, Any]
    status: str
    problem: str = ""
    step: int = 0
    steps: int | None = None
    loss: float | None = None

    @property
    def word(self) -> str:
        """Its status in a word or two."""
        return STATUS_WORDS.get(self.status, self.status)

    @property
    def share(self) -> float | None:
        """How far the training is, from 0 to 1."""
        return min(1.0, self.step / self.steps) if self.steps else None

    @property
    def kind(self) -> str:
        """The kind of its task, as far as its record tells."""
        names = {"AutoModelForCausalLM": "text", "AutoModelForImageTextToText": "vision"}
        base = self.record.get("base") or {}
        return names.get(str(base.get("auto_class")), str(base.get("auto_class") or ""))

    @property
    def started(self) -> float:
        """When it was started, in seconds since 1970; 0 if that is not known."""
        with contextlib.suppress(ValueError, TypeError):
            return datetime.fromisoformat(str(self.record.get("started"))).timestamp()
        return 0.0

    @property
    def held_out(self) -> tuple[float | None, float | None]:
        """Held-out loss before and after, as far as measured."""
        metrics = self.record.get("metrics") or {}
        before, after = ((metrics.get(phase) or {}).get("loss") for phase in ("before", "after"))
        return before, after


@dataclass(frozen=True)
class Found:
    """What is below a folder.

    Attributes:
        runs: Directories with a ``run.json``.
        comparisons: Directories with a ``compare.json``.
        adapters: Directories with an ``adapter_config.json``, and single files of adapters.
        models: Directories of base models.
        data: Files that may hold examples.
        recipes: YAML files.
    """

    runs: tuple[Path, ...] = ()
    comparisons: tuple[Path, ...] = ()
    adapters: tuple[Path, ...] = ()
    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    recipes: tuple[Path, ...] = ()


class Library:
    """What is below a workspace's folder, looked up again when it is asked for.

    Args:
        workspace: The folders.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.lock = threading.Lock()
        self.walked = 0.0
        self.last = Found()
        self.states: dict[Path, tuple[tuple[int, ...], RunState]] = {}
        self.logs: dict[Path, Metrics] = {}
        self.watched: dict[Path, list[tuple[float, int]]] = {}

    def find(self, is_fresh: bool = False) -> Found:
        """Return what is there.

        Args:
            is_fresh: Whether a walk of a moment ago does not do.
        """
        with self.lock:
            if is_fresh or time.monotonic() - self.walked > FRESH:
                self.last = self._walk()
                self.walked = time.monotonic()
            return self.last

    def _walk(self) -> Found:
        kinds: dict[str, list[Path]] = {name: [] for name in Found.__dataclass_fields__}
        for folder, names in self.workspace.walk():
            if "run.json" in names:
                kinds["runs"].append(folder)
            elif "compare.json" in names:
                kinds["comparisons"].append(folder)
            elif "adapter_config.json" in names:
                kinds["adapters"].append(folder)
            elif "config.json" in names or "model_index.json" in names:
                kinds["models"].append(folder)
            else:
                kinds["recipes"] += [folder / name for name in names if name.endswith((".yaml", ".yml"))]
                kinds["data"] += [
                    folder / name for name in names if name.endswith((".jsonl", ".json", ".csv", ".parquet"))
                ]
                kinds["adapters"] += [
                    folder / name for name in names if name.endswith((".safetensors", ".gguf"))
                ]
        return Found(**{name: tuple(sorted(paths)) for name, paths in kinds.items()})

    # ---- runs ------------------------------------------------------------------------------------------------

    def runs(self) -> list[RunState]:
        """Return every run, the newest first."""
        states = [self.state(path) for path in self.find().runs]
        return sorted(states, key=lambda state: (-state.started, state.name))

    def state(self, path: Path) -> RunState:
        """Return a run as it is.

        Args:
            path: Its directory.
        """
        run = RunDirectory(path)
        stamps: list[int] = []
        for file in (run.record, run.metrics):
            with contextlib.suppress(OSError):
                stat = file.stat()
                stamps += [stat.st_mtime_ns, stat.st_size, stat.st_ino]
        known = self.states.get(path)
        if known is not None and known[0] == tuple(stamps) and known[1].status != "running":
            return known[1]
        state = self._read(path, run)
        self.states[path] = (tuple(stamps), state)
        return state

    def _read(self, path: Path, run: RunDirectory) -> RunState:
        name = self.workspace.shown(path)
        try:
            record = run.read()
        except (MoSLoRAError, OSError) as error:
            return RunState(path, name, {}, "failed", str(error))
        status = str(record.get("status"))
        if status == "running" and not is_alive(run):
            status = "ended"
        log = self.metrics(path)
        return RunState(
            path,
            name,
            record,
            status,
            step=log.step,
            steps=_steps(record, log),
            loss=log.losses[-1][1] if log.losses else None,
        )

    def metrics(self, path: Path) -> Metrics:
        """Return what a run logged.

        Args:
            path: Its directory.
        """
        with self.lock:
            log = self.logs.setdefault(path, Metrics(RunDirectory(path).metrics))
            if log.update():
                seen = self.watched.setdefault(path, [])
                seen.append((time.monotonic(), log.step))
                del seen[:-30]
            return log

    def pace(self, path: Path) -> float | None:
        """Return how many seconds a step takes, as far as this page watched it; None if it did not.

        Args:
            path: The run's directory.
        """
        seen = [one for one in self.watched.get(path, ()) if time.monotonic() - one[0] < 120]
        if len(seen) < 2 or seen[-1][1] <= seen[0][1]:
            return None
        return (seen[-1][0] - seen[0][0]) / (seen[-1][1] - seen[0][1])

    def run(self, name: str) -> RunState:
        """Return a run by its name on the page.

        Args:
            name: From the page's folder on.

        Raises:
            NotFoundError: If it is gone.
            UsageError: If it is outside of the folders.
        """
        path = self.workspace.find(name)
        if not (path / "run.json").is_file():
            raise NotFoundError(f"There is no run {name} any more.")
        return self.state(path)

    def delete(self, name: str) -> None:
        """Remove a run directory, with all that is in it.

        Args:
            name: Of the run.

        Raises:
            UsageError: If it is running, or something else than a run below the page's folder.
        """
        state = self.run(name)
        if state.status == "running":
            raise UsageError(f"{name} is running. Stop it first.")
        if state.path.is_symlink() or not state.path.resolve().is_relative_to(self.workspace.root):
            raise UsageError(f"{name} is not below {self.workspace.root}, so it is not removed from here.")
        remove(state.path)
        self.states.pop(state.path, None)
        self.logs.pop(state.path, None)
        self.find(is_fresh=True)


def _steps(record: Mapping[str, Any], log: Metrics) -> int | None:
    """Return how many steps a run takes in all, from its trainer's arguments; by epochs from the log's."""
    trainer = record.get("trainer") or {}
    steps, epochs = trainer.get("max_steps"), trainer.get("num_train_epochs")
    if isinstance(steps, int) and steps > 0:
        return steps
    if isinstance(epochs, int | float) and log.epoch and log.step:
        return max(log.step, round(log.step / log.epoch * epochs))
    return None


def size_of(path: Path) -> tuple[int, int]:
    """Return how many files a directory holds, and their bytes.

    Args:
        path: The directory.
    """
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    return len(files), sum(file.stat().st_size for file in files)


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON object of a file; empty if it cannot be read.

    Args:
        path: The file.
    """
    try:
        found = read_json(path)
    except (MoSLoRAError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
