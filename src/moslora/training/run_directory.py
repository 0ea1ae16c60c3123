"""What a run leaves on disk.

```
runs/NAME/
├─ recipe.yaml        as resolved, every default written out
├─ run.json           status, versions, hardware, seed, hashes, timings, metrics, proofs
├─ metrics.jsonl      one line per logged step
├─ predictions.jsonl  one line per held-out example: the base's answer and the tuned one
├─ adapter/  lora/    native, to continue training; the fold, which loads anywhere
├─ checkpoints/       resumable
└─ report.html        one file, opens offline
```

Three laws hold whatever kills the process: a run never overwrites another, ``run.json`` is always one whole
JSON document, and no step stands twice in ``metrics.jsonl``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import shlex
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = [
    "STATUSES",
    "Checkpoint",
    "FollowedRun",
    "MetricsLog",
    "RunDirectory",
    "collect_hardware",
    "collect_versions",
    "is_alive",
    "read_metrics",
    "write_whole",
]

SCHEMA_VERSION = 1
STATUSES = ("running", "interrupted", "failed", "completed")
VERSIONED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "diffusers",
    "tokenizers",
    "safetensors",
    "numpy",
    "moslora",
)
# Two readings of one process's start time differ by clock corrections, never by this much.
START_TIME_TOLERANCE_SECONDS = 5.0
# A process on another machine cannot be asked, so the age of what it writes has to answer.
HEARTBEAT_SECONDS = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """One ``checkpoint-N`` folder of transformers' ``Trainer``.

    Attributes:
        path: The folder.
        step: Optimiser steps done when it was written.
        faults: What keeps training from going on here, in words; empty for a complete checkpoint.
    """

    path: Path
    step: int
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk. Made by :meth:`create` (new) or :meth:`open` (existing), never directly.

    Example:
        >>> import tempfile
        >>> run = RunDirectory.create(Path(tempfile.mkdtemp()), "demo")
        >>> run.update(metrics={"before": {"loss": 2.31}})
        >>> run.update(metrics={"after": {"loss": 0.12}}, status="completed")
        >>> run.read()["metrics"]
        {'before': {'loss': 2.31}, 'after': {'loss': 0.12}}
    """

    path: Path

    @classmethod
    def create(cls, parent: Path, name: str) -> RunDirectory:
        """Make a new run directory: ``name``, or the first free one of ``name-2``, ``name-3`` and so on.

        The folder itself is the lock: ``mkdir`` succeeds for one process only, so that two runs started at
        the same moment get two directories.

        Args:
            parent: Folder of runs; made if it is not there.
            name: Plain folder name.

        Returns:
            The run, with a ``run.json`` that says ``"running"``.

        Raises:
            ValueError: If ``name`` could lead out of ``parent`` or be taken for an option.
        """
        _check_name(name)
        parent = Path(parent)
        parent.mkdir(parents=True, exist_ok=True)
        attempt = 1
        while True:
            path = parent / (name if attempt == 1 else f"{name}-{attempt}")
            try:
                path.mkdir()
                break
            except FileExistsError:
                attempt += 1
        run = cls(path)
        opening = {"schema_version": SCHEMA_VERSION, "name": path.name, "stage": "starting", "ended": None}
        run._write({**opening, **_this_process(), "started": _now()})
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open a run that is on disk already, to resume or to read it.

        Args:
            path: The run's folder.

        Returns:
            The run; nothing is changed on disk.

        Raises:
            FileNotFoundError: If there is no run at ``path``; names the nearest run beside it.
            ValueError: If its ``run.json`` is damaged or was written by a newer version.
        """
        path = Path(path)
        run = cls(path)
        if not run.record.is_file():
            found = "has no run.json" if path.is_dir() else "is a file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"{path} is not a run: it {found}. {_nearest_run(path)}")
        version = run.read().get("schema_version")
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise ValueError(
                f"{run.record} has schema_version {version!r}, and this version of moslora reads up to "
                f"{SCHEMA_VERSION}; use the version that wrote it, or a newer one."
            )
        return run

    @property
    def recipe(self) -> Path:
        """The recipe as resolved."""
        return self.path / "recipe.yaml"

    @property
    def record(self) -> Path:
        """The ``run.json``."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def predictions(self) -> Path:
        """One JSON line per held-out example."""
        return self.path / "predictions.jsonl"

    @property
    def adapter(self) -> Path:
        """The native adapter's folder."""
        return self.path / "adapter"

    @property
    def lora(self) -> Path:
        """The folded adapter's folder."""
        return self.path / "lora"

    @property
    def checkpoints(self) -> Path:
        """The folder of resumable checkpoints."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """The offline report."""
        return self.path / "report.html"

    def read(self) -> dict[str, Any]:
        """Return ``run.json``.

        Raises:
            ValueError: If it is not one whole JSON object.
        """
        try:
            document = json.loads(self.record.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.record} is damaged ({error}). moslora replaces this file in one piece, so something "
                "else wrote it or the disk lost it: restore it from a copy, or start a new run."
            ) from error
        if not isinstance(document, dict):
            raise ValueError(f"{self.record} holds a {type(document).__name__}, not an object; restore it.")
        return document

    def update(self, **fields: Any) -> None:
        """Merge ``fields`` into ``run.json``, key by key at every depth, and replace the file in one piece.

        A status other than ``"running"`` sets ``ended``, unless it is given.

        Args:
            **fields: Values of JSON; paths, dates and scalars of numpy and torch are converted.

        Raises:
            ValueError: If the status is none of ``STATUSES``, or a number is NaN or infinite (JSON has
                neither); names the key and leaves the file as it was.
            TypeError: If a value has no form in JSON; names the key.
        """
        status = fields.get("status", "running")
        if status not in STATUSES:
            nearest = difflib.get_close_matches(str(status), STATUSES, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"choose one of {list(STATUSES)}."
            raise ValueError(f"status={status!r} is unknown; {hint}")
        if status != "running":
            fields.setdefault("ended", _now())
        self._write(_merged(self.read(), {key: _plain(value, key) for key, value in fields.items()}))

    def claim(self) -> None:
        """Take this run over, to resume it: from now on it is this process that is running it.

        Raises:
            RuntimeError: If another process still runs it.
        """
        with _only_one(self.path):
            record = self.read()
            if is_alive(self):
                raise RuntimeError(
                    f"{self.path} is still in progress: process {record.get('pid')} on {record.get('host')}, "
                    f"stage {record.get('stage')!r}. Wait for it, or stop that process and resume then."
                )
            for leftover in self.path.glob(".*.part"):
                leftover.unlink(missing_ok=True)
            record.pop("error", None)
            resumed = [*record.get("resumed", []), _now()]
            self._write({**record, **_this_process(), "stage": "resuming", "ended": None, "resumed": resumed})

    def all_checkpoints(self) -> list[Checkpoint]:
        """Return every ``checkpoint-N`` in order of N, the incomplete ones with their faults."""
        if not self.checkpoints.is_dir():
            return []
        found = []
        for path in self.checkpoints.iterdir():
            match = re.fullmatch(r"checkpoint-(\d+)", path.name)
            if match and path.is_dir():
                step = int(match[1])
                found.append(Checkpoint(path, step, tuple(_checkpoint_faults(path, step))))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def latest_checkpoint(self, say: Callable[[str], None] = logger.warning) -> Checkpoint | None:
        """Return the newest complete checkpoint.

        Args:
            say: Told, in one sentence each, about newer checkpoints that are skipped and why.

        Returns:
            The checkpoint, or None if there is no complete one.
        """
        for checkpoint in reversed(self.all_checkpoints()):
            if not checkpoint.faults:
                return checkpoint
            say(f"Skipped {checkpoint.path.name}, which is incomplete: {'; '.join(checkpoint.faults)}.")
        return None

    def _write(self, document: Mapping[str, Any]) -> None:
        write_whole(self.record, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class FollowedRun(RunDirectory):
    """A run that another process keeps; this one takes part in its training and reads it."""

    def update(self, **fields: Any) -> None:
        """Leave the record to the process whose it is."""


class MetricsLog:
    """Appends one JSON line per logged step, on disk before :meth:`append` returns.

    A NaN or infinite value is written as ``null`` and named under ``"not_finite"``: a loss that diverged
    is news, and must neither stop the log nor make it invalid JSON.

    Args:
        path: The ``metrics.jsonl``.
        resume_step: The step training goes on from. Lines past it, which the lost part of the run wrote,
            are dropped. None starts a new log.

    Raises:
        FileExistsError: If there is a log already and ``resume_step`` is None.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if resume_step is not None:
            lines = read_metrics(self.path) if self.path.exists() else []
            kept = [line for line in lines if line.get("step", 0) <= resume_step]
            write_whole(self.path, "".join(_json_line(line) for line in kept))
        elif self.path.exists():
            raise FileExistsError(f"{self.path} exists already; give resume_step to go on with it.")
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, step: int, **values: Any) -> None:
        """Write the line of ``step``.

        Args:
            step: Optimiser steps done.
            **values: Numbers and strings, such as ``loss=0.7, learning_rate=1e-3``.

        Raises:
            TypeError: If a value has no form in JSON; names the key.
        """
        line: dict[str, Any] = {"step": int(step)}
        not_finite = []
        for key, value in values.items():
            try:
                line[key] = _plain(value, key)
            except _NotFiniteError:
                line[key] = None
                not_finite.append(key)
        if not_finite:
            line["not_finite"] = not_finite
        self._file.write(_json_line(line))
        self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a ``metrics.jsonl``, also while it is being written.

    Args:
        path: The file.

    Returns:
        One dict per line. A last line without its newline was cut off by a kill and is left out.

    Raises:
        ValueError: If any other line is not a JSON object; names the line.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    return [_parsed_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it into place, so that a reader sees old or new, never half.

    Args:
        path: The file to write or to replace.
        text: Its content; written as UTF-8.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            # Without this a power cut can leave the new name on an empty file.
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def is_alive(run: RunDirectory) -> bool:
    """Say whether the process that wrote ``run`` is still at it.

    On this machine the process is looked up, and its start time compared, since process ids come again. A
    run of another machine counts as alive for a minute after it last wrote to its record or its metrics.

    Args:
        run: The run to look at.

    Returns:
        True if a resume would collide with it.
    """
    record = run.read()
    if record.get("status") != "running":
        return False
    if record.get("host") != socket.gethostname():
        written = [file.stat().st_mtime for file in (run.record, run.metrics) if file.exists()]
        return time.time() - max(written) < HEARTBEAT_SECONDS
    pid, started = record.get("pid"), record.get("process_started")
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    found = _process_started(pid)
    if found is None:
        return False
    return not isinstance(started, float) or abs(found - started) < START_TIME_TOLERANCE_SECONDS


def collect_versions() -> dict[str, str | None]:
    """Return the versions a result depends on: Python's and those of the packages; None if not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def collect_hardware() -> dict[str, Any]:
    """Return what the run has to work with.

    Returns:
        ``machine`` and ``cpu`` (names), ``cores`` (this process may use), ``memory_bytes`` (of the machine),
        ``gpus`` (names), ``torch_threads``.
    """
    import psutil
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable,
        "memory_bytes": int(psutil.virtual_memory().total),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "torch_threads": torch.get_num_threads(),
    }


class _NotFiniteError(ValueError):
    """A NaN or an infinity where JSON wants a number."""


def _plain(value: Any, key: str) -> Any:
    """Return ``value`` as JSON has it; ``key`` is its dotted path, for errors."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _NotFiniteError(f"{key} is {value}, which JSON cannot hold; leave it out or write None.")
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise TypeError(f"{key} has the key {name!r}; keys of JSON are strings.")
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # scalars of numpy and torch
        return _plain(value.item(), key)
    raise TypeError(f"{key} is a {type(value).__name__}, which has no form in JSON; convert it first.")


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = _merged(before, value)
        merged[key] = value
    return merged


def _json_line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"


def _parsed_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); remove or restore it.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}, line {number} is a {type(document).__name__}, not an object; remove it.")
    return document


def _check_name(name: str) -> None:
    faults = {
        "is empty": not name.strip(),
        "starts with '-', like an option": name.startswith("-"),
        "starts with '.', which hides it or leads elsewhere": name.startswith("."),
        "holds a path separator": "/" in name or "\\" in name,
        "holds a control character": any(not character.isprintable() for character in name),
    }
    for fault, present in faults.items():
        if present:
            raise ValueError(f"Run name {name!r} {fault}; use a plain folder name such as 'demo'.")


def _nearest_run(path: Path) -> str:
    parent = path.absolute().parent
    runs = sorted(record.parent.name for record in parent.glob("*/run.json")) if parent.is_dir() else []
    if not runs:
        return f"There are no runs in {parent}; 'moslora train' makes one."
    nearest = difflib.get_close_matches(path.name, runs, n=1)
    if nearest:
        return f"Did you mean {path.parent / nearest[0]}?"
    shown = ", ".join(runs[:8]) + (", …" if len(runs) > 8 else "")
    return f"Runs in {parent}: {shown}."


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "status": "running",
        "pid": pid,
        "process_started": _process_started(pid),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
    }


def _process_started(pid: int) -> float | None:
    """Return when process ``pid`` of this machine started, in seconds since 1970; None if it is gone."""
    import psutil

    try:
        process = psutil.Process(pid)
        # A zombie has ended and only waits to be collected; it writes nothing any more.
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None


@contextlib.contextmanager
def _only_one(directory: Path) -> Iterator[None]:
    """Let one process at a time past here; the kernel lets go of the lock if its holder dies."""
    try:
        import fcntl
    except ImportError:  # Windows; there two resumes within the same millisecond are not told apart
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _checkpoint_faults(path: Path, step: int) -> Iterator[str]:
    # Nothing is unpickled to find this out: the ends of the files say whether they are whole.
    if (path / "checkpoint-is-incomplete.txt").exists():
        yield "it is marked as incomplete"
    # Several processes leave one random state each: rng_state_0.pth, rng_state_1.pth, …
    random_states = sorted(file.name for file in path.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", *random_states):
        file = path / name
        is_whole = _is_whole_safetensors if file.suffix == ".safetensors" else zipfile.is_zipfile
        if not file.is_file():
            yield f"{name} is missing"
        elif not is_whole(file):
            yield f"{name} is cut off"
    # The trainer writes this one last.
    state = path / "trainer_state.json"
    try:
        found = json.loads(state.read_bytes())["global_step"]
        if found != step:
            yield f"trainer_state.json is of step {found}"
    except FileNotFoundError:
        yield "trainer_state.json is missing"
    except (ValueError, KeyError, TypeError):
        yield "trainer_state.json is cut off"


def _is_whole_safetensors(file: Path) -> bool:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if header_size > size - 8:
            return False
        try:
            header = json.loads(stream.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return size == 8 + header_size + max(ends, default=0)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
