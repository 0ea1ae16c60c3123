"""Files written whole or not at all, and locks between processes.

What is half written has a name that ends in ``.part`` and says whose it is, so that the next one who writes to the same
place removes what a killed process left, and does not touch what another is still writing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from moslora.errors import BusyError, ExistsError, UsageError

__all__ = [
    "clear_leftovers",
    "is_running",
    "lifeline",
    "locked",
    "new_directory",
    "new_file",
    "process_start",
    "refuse_undecodable",
    "remove",
    "replaced_file",
    "scratch",
    "sha256",
    "write_text",
]

# Seconds. Two readings of one process's start differ by corrections of the clock, never by this much.
START_TOLERANCE = 5.0
PLACE = "moslora_place"  # the attribute of an error that says what was being written


# --- Written whole or not at all ----------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it into place, so that a reader sees the old or the new content.

    Args:
        path: The file to write or to replace.
        text: Its content; written as UTF-8. What UTF-8 does not have, as bytes in the name of a file, is escaped as
            JSON and YAML do it.
    """
    with (
        replaced_file(path) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
    ):
        file.write(text)


@contextlib.contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Write a file beside ``path`` and rename it into place when the block ends well.

    Args:
        path: The file to write or to replace. Its directory must exist.

    Yields:
        A hidden path beside it that ends in ``.part``. If the block raises, it is removed and ``path``
        stays as it was.
    """
    path = Path(path)
    stem = f".{path.name}"
    clear_leftovers(path.parent, stem)
    part = path.with_name(_marked(stem))
    _writing.add(part.name)
    try:
        yield part
        # Without this a power cut can leave the new name on an empty file.
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        _name(error, path)
        part.unlink(missing_ok=True)
        raise
    finally:
        _writing.discard(part.name)


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Write a directory beside its place and rename it into place when the block ends well.

    Args:
        out: The new directory; must not exist, or be an empty directory.

    Yields:
        A temporary directory beside ``out``. If the block raises, it is removed and ``out`` stays as it was.

    Raises:
        BusyError: If another process of this machine is writing to ``out``.
        ExistsError: If something exists at ``out``, or does when the block ends.
        UsageError: If its name is not UTF-8.
    """
    out = Path(out)
    with _claimed(out, "directory") as temporary:
        yield temporary
        try:
            temporary.replace(out)
        except OSError:
            if os.path.lexists(out):
                raise ExistsError(_overtaken(out)) from None
            raise


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Write a file beside its place and put it there when the block ends well.

    Args:
        out: The new file; must not exist.

    Yields:
        A path of the same name in a temporary directory beside ``out``. If the block raises, nothing is left of it.

    Raises:
        BusyError: If another process of this machine is writing to ``out``.
        ExistsError: If something exists at ``out``, or does when the block ends.
        UsageError: If its name is not UTF-8.
    """
    out = Path(out)
    with _claimed(out, "file") as temporary:
        yield temporary / out.name
        # A rename would replace what another process has put there since.
        try:
            try:
                os.link(temporary / out.name, out)
            except (FileExistsError, FileNotFoundError):
                raise
            except OSError:  # a file system without hard links
                os.close(os.open(out, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                (temporary / out.name).replace(out)
        except FileExistsError:
            raise ExistsError(_overtaken(out)) from None


@contextlib.contextmanager
def _claimed(out: Path, what: str) -> Iterator[Path]:
    """Make a temporary directory beside the place of something new, and remove what is left of it in the end."""
    refuse_undecodable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    stem = f".{out.name}"
    for writer in clear_leftovers(out.parent, stem):
        raise BusyError(
            f"Process {writer} is writing {out}. Wait for it, or name another {what}; nothing was written."
        )
    is_free = not os.path.lexists(out) or (
        what == "directory" and out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    )
    if not is_free:
        raise ExistsError(f"{out} exists already. Name a new {what}, or remove that one first.")
    try:
        with scratch(stem, out.parent) as temporary:
            yield temporary
    except BaseException as error:
        _name(error, out)
        raise


def _overtaken(out: Path) -> str:
    return (
        f"{out} exists now: another process wrote it meanwhile, and it was left as it is. Name another place, or "
        "remove that one first."
    )


def _name(error: BaseException, path: Path) -> None:
    """Note on an error what was being written: a failed write names no file, a copy its source, others a hidden one."""
    with contextlib.suppress(AttributeError):
        setattr(error, PLACE, str(path))


def refuse_undecodable(path: str | os.PathLike[str]) -> None:
    """Refuse a name that is not UTF-8 where libraries take names as text alone: safetensors, tokenizers.

    Args:
        path: The file or directory.

    Raises:
        UsageError: If it is one; says how to rename it.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not UTF-8 from its character {error.start + 1} on, and the libraries that read and write "
            "weights and tokenizers take no such name. Rename it, as with: mv OLD NEW (a shell completes OLD with Tab)."
        ) from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Args:
        path: The file.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- What is half written, and whose it is ------------------------------------------------------------------

# STEM.MACHINE-PID-RANDOM.part; version 0.1 wrote no machine.
_PART = re.compile(r"(?P<stem>.*)\.(?:(?P<machine>[0-9a-f]{8})-)?(?P<pid>\d+)-[0-9a-f]{8}\.part", re.DOTALL)
LONGEST_STEM = 120  # bytes, of the 255 that a name may have
ABANDONED_AFTER = 24 * 3600.0  # seconds, for what another machine wrote: its processes cannot be asked
_writing: set[str] = set()  # by this process, now


@contextlib.contextmanager
def scratch(stem: str, parent: Path | None = None) -> Iterator[Path]:
    """Make a temporary directory, and remove it when the block ends.

    What killed processes left under the same stem is removed first.

    Args:
        stem: What its name begins with, as ``moslora-proof``.
        parent: Where; None for the system's place for temporary files, where nobody else can read it.

    Yields:
        The directory. It may be renamed; it is not removed then.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    clear_leftovers(place, stem)
    temporary = place / _marked(stem)
    _writing.add(temporary.name)
    try:
        temporary.mkdir(0o700 if parent is None else 0o777)  # which follows the umask, unlike tempfile's
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _writing.discard(temporary.name)


def clear_leftovers(directory: Path, stem: str | None = None) -> list[int]:
    """Remove what killed processes left half written.

    Args:
        directory: Where to look; not in the directories in it.
        stem: What their names begin with; None for anything.

    Returns:
        The processes of this machine that are still writing there; what is theirs is left alone.
    """
    writers = []
    stem = None if stem is None else _cut(stem)
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.name.endswith(".part")]
    except OSError:
        return []
    for name in names:
        found = _PART.fullmatch(name)
        if found is None or stem not in (None, found["stem"]):
            continue
        path, pid = directory / name, int(found["pid"])
        with contextlib.suppress(OSError):
            status = path.lstat()
            if found["machine"] != _machine():
                is_left = time.time() - status.st_mtime > ABANDONED_AFTER
            elif pid == os.getpid():
                is_left = name not in _writing
            else:
                began = process_start(pid)
                # A process that began after this was written has only the same id.
                is_left = began is None or began > status.st_mtime + START_TOLERANCE
            if not is_left and found["machine"] == _machine():
                writers.append(pid)
            elif is_left and (not hasattr(os, "getuid") or status.st_uid == os.getuid()):
                remove(path)
    return writers


def remove(path: Path) -> None:
    """Remove a file, a link or a directory with all that is in it, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _cut(stem: str) -> str:
    """Shorten a stem so that there is room for more in a name; other stems stay others."""
    name = os.fsencode(stem)
    if len(name) <= LONGEST_STEM:
        return stem
    return f"{name[:LONGEST_STEM].decode('utf-8', 'ignore')}~{hashlib.sha256(name).hexdigest()[:8]}"


def _marked(stem: str) -> str:
    return f"{_cut(stem)}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.part"


@functools.cache
def _machine() -> str:
    """Tell machines apart, and containers on one, whose process ids mean other processes."""
    space = ""
    with contextlib.suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


# --- Other processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a directory; the kernel releases it if its holder dies.

    Windows and some network file systems cannot lock; there the block runs without.

    Args:
        directory: The directory, which must exist.
        wait: Wait for another holder; otherwise refuse.

    Raises:
        BusyError: If another process holds the lock and ``wait`` is false.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BusyError(
                f"Another process is working in {directory}. Wait for it, or name another directory."
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lifeline() -> Iterator[int]:
    """Make a standard input for a process that should not outlive this one.

    Yields:
        A descriptor at which nothing can be read until the block ends, or this process dies, however it does.
    """
    reading, holding = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(holding)


def process_start(pid: int) -> float | None:
    """Return when a process of this machine began, in seconds since 1970; None if there is none.

    Args:
        pid: Its id. Ids are used again, which the time tells apart.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
    except psutil.AccessDenied:  # it exists, and is another user's
        return math.nan


def is_running(pid: int, started: float | None = None) -> bool:
    """Return whether a process of this machine is running.

    Args:
        pid: Its id.
        started: When it began, if known, to tell it from a later process with the same id.
    """
    found = process_start(pid)
    return found is not None and (started is None or not abs(found - started) >= START_TOLERANCE)
