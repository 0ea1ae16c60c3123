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
import itertools
import json
import logging
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moslora.errors import BusyError, NotFoundError, UsageError
from moslora.files import is_running, locked, process_start, refuse_undecodable, remove, scratch, write_text
from moslora.training.checkpoints import Checkpoint, checkpoint_faults
from moslora.training.json_values import json_value, merged
from moslora.wording import did_you_mean, nearest

__all__ = [
    "HEARTBEAT_SECONDS",
    "STATUSES",
    "FollowedRun",
    "RunDirectory",
    "is_alive",
    "now",
]

RUN_SCHEMA_VERSION = 1
STATUSES = ("running", "interrupted", "failed", "completed")
# As it stands in run.json, with the white space around it, which gives a longer status its room.
_STATUS_LINE = re.compile(rb'\n *"status": *"\w+",\n *')
# A process on another machine cannot be asked, so the age of what it writes has to answer.
HEARTBEAT_SECONDS = 60.0
# What names the process that holds a run, in its record.
HOLDER = ("host", "pid", "process_started")
LOOKS = 1.0  # seconds between two looks at a run that seems to be in progress

logger = logging.getLogger(__name__)


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
    def create(
        cls, parent: Path, name: str, recipe: str | None = None, only_as_named: bool = False, **fields: Any
    ) -> RunDirectory:
        """Make a new run directory: ``name``, or the first free one of ``name-2``, ``name-3`` and so on.

        It is written under another name and renamed, which succeeds for one process only, so that two runs started at
        the same moment get two directories, and none is ever without its record.

        Args:
            parent: Folder of runs; made if it is not there.
            name: Plain folder name.
            recipe: The text of its ``recipe.yaml``; None if that is written later.
            only_as_named: Whether it must be ``name``, and no other.
            **fields: More of ``run.json``, as for :meth:`update`.

        Returns:
            The run, with a ``run.json`` that says ``"running"``.

        Raises:
            ValueError: If ``name`` could lead out of ``parent`` or be taken for an option.
        """
        _check_name(name)
        parent = Path(parent)
        refuse_undecodable(parent.absolute() / name)
        is_new = not parent.exists()
        parent.mkdir(parents=True, exist_ok=True)
        opening = {"schema_version": RUN_SCHEMA_VERSION, "name": name, "stage": "starting", "ended": None}
        more = {key: json_value(value, key) for key, value in fields.items()}
        with _removed_if_new(parent, is_new), scratch(f".{name}", parent) as made:
            run = cls(made)
            if recipe is not None:
                write_text(run.recipe, recipe)
            for attempt in itertools.count(1):
                path = parent / (name if attempt == 1 else f"{name}-{attempt}")
                if os.path.lexists(path):
                    if only_as_named:
                        raise BusyError(f"{path} was begun by another process just now; nothing was started.")
                    continue
                run._write({**opening, "name": path.name, **_this_process(), "started": now(), **more})
                try:
                    made.rename(path)
                    return cls(path)
                except OSError:
                    if not os.path.lexists(path):
                        raise
        raise AssertionError("there is always another number")

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
            raise NotFoundError(f"{path} is not a run: it {found}. {_nearest_run(path)}")
        version = run.read().get("schema_version")
        if not isinstance(version, int) or version > RUN_SCHEMA_VERSION:
            raise UsageError(
                f"{run.record} has schema_version {version!r}, and this version of moslora reads up to "
                f"{RUN_SCHEMA_VERSION}; use the version that wrote it, or a newer one."
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
            raise UsageError(
                f"{self.record} is damaged ({error}). moslora replaces this file in one piece, so something "
                "else wrote it or the disk lost it: restore it from a copy, or start a new run."
            ) from error
        if not isinstance(document, dict):
            raise UsageError(f"{self.record} holds a {type(document).__name__}, not an object; restore it.")
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
            raise UsageError(
                f"status={status!r} is unknown. Choose one of {list(STATUSES)}.{did_you_mean(status, STATUSES)}"
            )
        if status != "running":
            fields.setdefault("ended", now())
        self._write(merged(self.read(), {key: json_value(value, key) for key, value in fields.items()}))

    def end(self, status: str, **fields: Any) -> None:
        """Note how the run ended, at least its status where the disk has no room for more.

        Args:
            status: One of ``STATUSES``.
            **fields: As for ``update``.
        """
        try:
            self.update(status=status, **fields)
        except OSError:
            self._overwrite_status(status)

    def _overwrite_status(self, status: str) -> None:
        """Replace the status where it stands, in one write and without a byte more, which needs no room on the disk."""
        found = _STATUS_LINE.search(self.record.read_bytes())
        line = f'\n"status":"{status}",\n'.encode()
        if found and len(line) <= len(found[0]):
            with self.record.open("r+b", buffering=0) as file:
                file.seek(found.start())
                file.write(line + b" " * (len(found[0]) - len(line)))

    def is_held(self) -> bool:
        """Tell whether the record names this process as the one that runs it: then nobody has taken the run over."""
        record = self.read()
        return all(record.get(key) == _this_process()[key] for key in HOLDER)

    def claim(self, wait: float = 0.0) -> None:
        """Take this run over, to resume it: from now on it is this process that is running it.

        Args:
            wait: Seconds to wait for another process that seems to run it.

        Raises:
            RuntimeError: If another process still runs it.
        """
        deadline = time.monotonic() + wait
        while is_alive(self) and time.monotonic() < deadline:
            time.sleep(LOOKS)
        with locked(self.path):
            record = self.read()
            if is_alive(self):
                raise BusyError(
                    f"{self.path} is still in progress: process {record.get('pid')} on {record.get('host')}, "
                    f"stage {record.get('stage')!r}. Wait for it, or stop that process and resume then."
                )
            for pattern in (".*.part", ".start.*"):
                for leftover in [*self.path.glob(pattern), *self.path.glob(f"*/{pattern}")]:
                    remove(leftover)
            record.pop("error", None)
            resumed = [*record.get("resumed", []), now()]
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
                found.append(Checkpoint(path, step, tuple(checkpoint_faults(path, step))))
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

    def remove_incomplete_checkpoints(self, step: int) -> None:
        """Remove what a kill left of checkpoints past a step, so that nothing of it gets into those that follow.

        Args:
            step: The step from which training continues.
        """
        for checkpoint in self.all_checkpoints():
            if checkpoint.faults and checkpoint.step > step:
                remove(checkpoint.path)

    def keep_newest_checkpoints(self, count: int) -> None:
        """Remove all checkpoints but the newest, whole or not.

        Args:
            count: How many stay.
        """
        for checkpoint in self.all_checkpoints()[: -max(count, 1)]:
            remove(checkpoint.path)

    def _write(self, document: Mapping[str, Any]) -> None:
        write_text(self.record, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class FollowedRun(RunDirectory):
    """A run that another process keeps; this one takes part in its training and reads it."""

    def update(self, **fields: Any) -> None:
        """Leave the record to the process whose it is."""


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
    return is_running(pid, started if isinstance(started, float) else None)


@contextlib.contextmanager
def _removed_if_new(parent: Path, is_new: bool) -> Iterator[None]:
    """Remove the folder of runs again if it was made for a run of which nothing came."""
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # another run has begun in it
                parent.rmdir()
        raise


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
            raise UsageError(f"Run name {name!r} {fault}; use a plain folder name such as 'demo'.")


def _nearest_run(path: Path) -> str:
    parent = path.absolute().parent
    records = parent.glob("*/run.json") if parent.is_dir() else []
    runs = sorted(record.parent.name for record in records if not record.parent.name.startswith("."))
    if not runs:
        return f"There are no runs in {parent}; 'moslora train' makes one."
    name = nearest(path.name, runs)
    if name:
        return f"Did you mean {path.parent / name}?"
    shown = ", ".join(runs[:8]) + (", …" if len(runs) > 8 else "")
    return f"Runs in {parent}: {shown}."


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "status": "running",
        "pid": pid,
        "process_started": process_start(pid),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
    }


def now() -> str:
    """Return the time, as ``run.json`` has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
