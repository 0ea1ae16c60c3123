"""Files written whole or not at all, locks between processes, and JSON and safetensors headers within bounds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.errors import ExistsError, UsageError
from moslora.wording import one_line

__all__ = [
    "Header",
    "StoredTensor",
    "is_running",
    "kind_of_file",
    "locked",
    "new_directory",
    "new_file",
    "process_start",
    "read_header",
    "read_json",
    "read_text",
    "replaced_file",
    "sha256",
    "write_text",
]

# Seconds. Two readings of one process's start differ by corrections of the clock, never by this much.
START_TOLERANCE = 5.0
LONGEST_HEADER = 100_000_000  # bytes; what the safetensors library takes
LARGEST_JSON = 64 << 20  # bytes; an index of the shards of a huge model has some 10 MiB
MOST_DIMENSIONS = 64
# Bits of an element, by the format's names (safetensors 0.8). Another name is an error, as it is for the library.
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


# --- Written whole or not at all ----------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write ``text`` beside ``path`` and rename it into place, so that a reader sees the old or the new content.

    Args:
        path: The file to write or to replace.
        text: Its content; written as UTF-8.
    """
    with replaced_file(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
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
    part = _beside(path)
    try:
        yield part
        # Without this a power cut can leave the new name on an empty file.
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Write a directory beside its place and rename it into place when the block ends well.

    Args:
        out: The new directory; must not exist, or be an empty directory.

    Yields:
        A temporary directory beside ``out``. If the block raises, it is removed and ``out`` stays as it was.

    Raises:
        ExistsError: If something exists at ``out``.
    """
    out = Path(out)
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ExistsError(f"{out} exists already. Name a new directory, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(out)
    temporary.mkdir()  # tempfile's would not follow the umask
    try:
        yield temporary
        temporary.replace(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """Write a file beside its place and rename it into place when the block ends well.

    Args:
        out: The new file; must not exist.

    Yields:
        A path of the same name in a temporary directory beside ``out``. If the block raises, nothing is left of it.

    Raises:
        ExistsError: If something exists at ``out``.
    """
    out = Path(out)
    if out.is_symlink() or out.exists():
        raise ExistsError(f"{out} exists already. Name a new file, or remove that one first.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(out)
    temporary.mkdir()
    try:
        yield temporary / out.name
        (temporary / out.name).replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(path: Path) -> Path:
    """Return a new hidden name in the same directory."""
    return path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part")


def kind_of_file(path: Path) -> str:
    """Return what a path is, if it is not an ordinary file: ``"a named pipe"``, ``"a folder"``, …; else an empty text.

    Args:
        path: Anything; links are followed.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - takes names that are not paths too
    except (OSError, ValueError):
        return "missing"
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    if stat.S_ISREG(mode):
        return ""
    return next((name for is_one, name in kinds if is_one(mode)), "a device")


def read_text(path: Path, most: int = 1 << 20) -> str:
    """Read a text file within bounds.

    Args:
        path: The file, in UTF-8.
        most: Bytes that it may have.

    Raises:
        ValueError: If it is not an ordinary file, larger, or not UTF-8.
        OSError: If it cannot be opened.
    """
    kind = kind_of_file(path)
    if kind not in ("", "missing"):
        raise ValueError(f"it is {kind}, not a file")
    with Path(path).open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most >> 20} MiB")
    return text.decode("utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file of a configuration, within bounds.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not JSON, not an ordinary file, larger than ``LARGEST_JSON``, or nested too deeply.
        OSError: If it cannot be opened.
    """
    try:
        return json.loads(read_text(path, LARGEST_JSON))
    except RecursionError:
        raise ValueError("it has too many nested levels") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, as hexadecimal digits.

    Args:
        path: The file.
    """
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Other processes ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(directory: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a directory; the kernel releases it if its holder dies.

    Windows and some network file systems cannot lock; there the block runs without.

    Args:
        directory: The directory, which must exist.
        wait: Wait for another holder; otherwise refuse.

    Raises:
        UsageError: If another process holds the lock and ``wait`` is false.
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
            raise UsageError(
                f"Another process is working in {directory}. Wait for it, or name another directory."
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


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


# --- safetensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is in a safetensors file.

    Attributes:
        dtype: The format's name, such as ``"BF16"``.
        shape: Its shape.
        start: Offset of its first byte from the beginning of the file.
        end: Offset after its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        tensors: By name, in the file's order.
        metadata: Its free text.
        length: Bytes of the header's JSON.
    """

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    length: int


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file, and check that every byte it names is there.

    Args:
        path: The file. Its tensors are not read.

    Raises:
        ValueError: If it is damaged or cut off; the message says how, without the path.
        OSError: If it cannot be read.
    """
    kind = kind_of_file(path)
    if kind not in ("", "missing"):
        raise ValueError(f"it is {kind}, not a file")
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"its header would be {length} bytes long, and the file has {size}")
        text = file.read(length)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=_each_once)
        metadata = entries.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("metadata must be texts")
        tensors = {
            name: StoredTensor(
                entry["dtype"],
                tuple(map(_natural, entry["shape"])),
                *(8 + length + _natural(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {one_line(error)})") from None
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if len(tensor.shape) > MOST_DIMENSIONS:
            raise ValueError(f"{one_line(name)} has {len(tensor.shape)} dimensions")
        if tensor.start != end or tensor.end < tensor.start:
            raise ValueError(f"{one_line(name)} begins at byte {tensor.start} instead of {end}")
        if tensor.dtype not in BITS:
            raise ValueError(f"{one_line(name)} has the unknown dtype {one_line(repr(tensor.dtype), 40)}")
        if math.prod(tensor.shape) * BITS[tensor.dtype] != 8 * (tensor.end - end):
            raise ValueError(
                f"{one_line(name)} has {tensor.end - end} bytes, which are not {tensor.dtype} of shape {tensor.shape}"
            )
        end = tensor.end
    if end != size:
        raise ValueError(f"it has {size} bytes, and its header says {end}")
    return Header(tensors, metadata, length)


def _natural(value: Any) -> int:
    """Return a whole number from 0; a fraction, a text or a truth value is not one."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{one_line(repr(value), 40)} is not a whole number from 0 to 2^63")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON, in which a name that occurs twice is an error."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
