"""Commands that the page starts: processes of their own, which outlive it.

Each is ``python -m moslora …`` in a session of its own, with a record beside what it writes, so that a page that was
closed, or another one, finds it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.errors import NotFoundError, UsageError
from moslora.files import is_running, process_start, write_text
from moslora.studio.workspace import Workspace

__all__ = ["Job", "Jobs"]

KEPT_OUTPUT = 16_000  # bytes of the end of what a process wrote, that a page shows
OLD_JOBS = 200  # records that are kept of commands that ended


@dataclass(frozen=True)
class Job:
    """A command that the page started.

    Attributes:
        name: Of its record.
        title: What it is, for people.
        arguments: Of the command ``moslora``.
        pid, process_started: Of its process.
        time: When it was started, in seconds since 1970.
        folder: Where its record and output are.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    pid: int
    process_started: float | None
    time: float
    folder: Path

    @property
    def is_running(self) -> bool:
        """Whether its process is there."""
        return is_running(self.pid, self.process_started) and not _is_zombie(self.pid)

    @property
    def command(self) -> str:
        """The same on a command line."""
        return shlex.join(["moslora", *self.arguments])

    @property
    def output(self) -> str:
        """The end of what it wrote."""
        file = self.folder / f"{self.name}.log"
        with contextlib.suppress(OSError), file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - KEPT_OUTPUT))
            text = stream.read().decode("utf-8", errors="replace")
            if size > KEPT_OUTPUT:
                text = "…\n" + text.partition("\n")[2]
            # A bar that draws over itself leaves its last state.
            return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))
        return ""

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs, or if nobody was there to see it."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / f"{self.name}.exit").read_text(encoding="ascii"))
        return None

    @property
    def error(self) -> str:
        """The message that it ended with; empty if there is none."""
        lines = self.output.strip().splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("Error:")]
        return "\n".join(lines[starts[-1] :]) if starts else ""


class Jobs:
    """The commands of a workspace.

    Args:
        workspace: Where they work.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def folder(self) -> Path:
        """Where records and outputs are."""
        folder = self.workspace.private / "jobs"
        folder.mkdir(exist_ok=True)
        return folder

    def start(self, title: str, arguments: Sequence[str], environment: dict[str, str] | None = None) -> Job:
        """Start a command in a process of its own.

        Args:
            title: What it is, for people.
            arguments: Of the command ``moslora``.
            environment: Variables beside those of this process.

        Returns:
            The job, running.
        """
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **(environment or {})}
        command = [sys.executable, "-m", "moslora", *arguments]
        with (self.folder / f"{name}.log").open("wb") as log:
            child = subprocess.Popen(
                command,
                cwd=self.workspace.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,  # a Ctrl-C at the page's terminal is for the page
            )
        self.children[name] = child
        job = Job(
            name, title, tuple(arguments), child.pid, process_start(child.pid), time.time(), self.folder
        )
        record = {
            "title": title,
            "arguments": list(arguments),
            "pid": job.pid,
            "process_started": job.process_started,
            "time": job.time,
        }
        write_text(self.folder / f"{name}.json", json.dumps(record, indent=2, ensure_ascii=False))
        return job

    def all(self) -> list[Job]:
        """Return every command that is known, the newest first."""
        self._reap()
        found = []
        for file in sorted(self.folder.glob("*.json"), reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                found.append(_job(file))
        for job in found[OLD_JOBS:]:
            if not job.is_running:
                self.forget(job)
        return found[:OLD_JOBS]

    def find(self, name: str) -> Job:
        """Return a command by its name.

        Raises:
            NotFoundError: If there is none.
        """
        self._reap()
        found = next((job for job in self.all() if job.name == name), None)
        if found is None:
            raise NotFoundError(f"There is no command {name!r} any more.")
        return found

    def forget(self, job: Job) -> None:
        """Remove the record of a command that ended, with what it wrote.

        Args:
            job: The command.
        """
        for file in self.folder.glob(f"{job.name}.*"):
            file.unlink(missing_ok=True)

    def _reap(self) -> None:
        """Take note of children that ended, which would stay in the table of processes."""
        for name, child in list(self.children.items()):
            code = child.poll()
            if code is not None:
                del self.children[name]
                with contextlib.suppress(OSError):
                    write_text(self.folder / f"{name}.exit", str(code))


def stop_process(pid: int, started: float | None) -> None:
    """Ask a process to stop at its next safe place.

    Args:
        pid: Its id.
        started: When it began, so that no later process of the same id is meant.

    Raises:
        UsageError: If it is not there.
    """
    if not is_running(pid, started):
        raise UsageError("It is not running any more.")
    os.kill(pid, signal.SIGINT if sys.platform == "win32" else signal.SIGTERM)


def _job(file: Path) -> Job:
    record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return Job(
        name=file.stem,
        title=str(record["title"]),
        arguments=tuple(map(str, record["arguments"])),
        pid=int(record["pid"]),
        process_started=record["process_started"],
        time=float(record["time"]),
        folder=file.parent,
    )


def _is_zombie(pid: int) -> bool:
    """Say whether a process has ended and its parent has not asked yet, as one that another page started."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
