"""What ends a verb and is not an error of ours: put in words, with what was being done and what to do.

A full disk becomes a ``DiskFullError`` that says where, how much is free and how to continue. Other libraries' errors
stay what they are, with a note (PEP 678) that says the same of them; a traceback of Python's shows it, and the
command does.
"""

from __future__ import annotations

import contextlib
import errno
import linecache
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from moslora.compat.telemetry import no_telemetry
from moslora.errors import DiskFullError, MoSLoRAError
from moslora.files import PLACE
from moslora.wording import size_in_words

__all__ = ["GO_ON", "add_frame", "frame_of", "full_disk", "is_ours", "raise_if_full", "verb"]

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# How libraries in Rust and C++ say it; torch.save only that its zip file ends elsewhere than it should.
FULL_IN_WORDS = re.compile(
    r"No space left on device|File too large|Disk quota exceeded|os error (?:28|27|122)\b|"
    r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|file write failed|iostream error"
)
NOT_FORESEEN = (
    "No check foresaw it. Run again with --debug (in Python, look at the traceback) to see where it came from; if the "
    "input is sound, it is a fault of moslora: please report it with that output."
)
# What an error says or is → what to do.
ADVICE: tuple[tuple[str, str], ...] = (
    (
        r"MemoryError|can't allocate memory|Cannot allocate memory|out of memory|ALLOC_FAILED",
        "The memory does not do. Take fewer rows at once (trainer.per_device_train_batch_size), shorter ones "
        "(trainer.max_length) or a smaller rank; `moslora plan` counts what a training takes.",
    ),
    (
        r"index out of range in self|device-side assert|indexSelectSmallIndex",
        "A token or a position is beyond the model's embedding: the tokenizer belongs to another model, or a row is "
        "longer than the model's context (trainer.max_length).",
    ),
    (r"RecursionError", "Something is nested too deeply: look for brackets or lists within lists in the input."),
    (
        r"Too many open files",
        "Allow more open files (ulimit -n 4096), or give the data in fewer of them.",
    ),
    (
        r"PermissionError|Read-only file system",
        "Check whose the file and its folder are, or name another place.",
    ),
    (
        r"NotADirectoryError|IsADirectoryError|File name too long",
        "Check the path: a part of it is something else than it should be, or too long a name.",
    ),
)  # fmt: skip
# How a comparison continues.
GO_ON = "run the same command again: finished cells are kept."
# What each verb does, by the command's name.
DOING = {
    "train": "training",
    "resume": "resuming a run",
    "mix": "mixing adapters",
    "check": "checking a recipe",
    "compare": "comparing methods",
    "check_comparison": "checking a comparison",
    "report": "writing a report",
    "evaluate": "evaluating",
    "chat": "talking",
    "advise": "looking for advice",
    "plan": "counting memory",
    "export": "exporting an adapter",
    "import": "importing an adapter",
    "combine": "combining adapters",
    "merge": "merging an adapter",
    "inspect": "inspecting an adapter",
    "doctor": "looking an adapter over",
    "push": "uploading an adapter",
    "studio": "serving the page",
}
START = "While "  # how a frame begins


def chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def full_disk(error: BaseException) -> OSError | BaseException | None:
    """Return the error in a chain that says that a disk is full; None if there is none.

    Args:
        error: What was raised.
    """
    for one in chain(error):
        if isinstance(one, OSError) and one.errno in FULL:
            return one
        if not isinstance(one, MoSLoRAError) and FULL_IN_WORDS.search(str(one)):
            return one
    return None


def raise_if_full(error: BaseException, place: str | os.PathLike[str] | None, then: str) -> None:
    """Raise a ``DiskFullError`` if that is what an error comes down to.

    Args:
        error: What was raised.
        place: What was being written, for errors that do not say it; None for the current folder.
        then: How to continue when there is room, the rest of a sentence.

    Raises:
        DiskFullError: Then; it comes from ``error``.
    """
    if isinstance(error, DiskFullError) or (found := full_disk(error)) is None:
        return
    path = Path(_written(error) or os.fsdecode(place or "."))
    limit = None if getattr(found, "errno", None) == errno.ENOSPC else _largest_file()
    if limit is None:
        what = f"The disk is full: {path} could not be written whole.{_free(path)} Free some space, then"
    else:
        what = (
            f"{path} could not be written whole: a file may have {size_in_words(limit)} here. Raise that limit "
            "(ulimit -f unlimited), then"
        )
    raise DiskFullError(f"{what} {then}") from error


def _written(error: BaseException) -> str | None:
    """Return the file or directory that was being written; None if nothing says it."""
    for attribute in (PLACE, "filename"):
        for one in chain(error):
            if getattr(one, attribute, None):
                return os.fsdecode(getattr(one, attribute))
    return None


def _largest_file() -> int | None:
    """Return how many bytes a file may have in this process; None if there is no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _free(path: Path) -> str:
    """Say how much is free where a path lies."""
    for folder in (path, *path.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(folder)
            return f" {size_in_words(usage.free)} of {size_in_words(usage.total)} are free there."
    return ""


def is_ours(error: BaseException) -> bool:
    """Return whether an error was raised by this package on purpose, so that its message says it all.

    Args:
        error: What was raised.
    """
    if isinstance(error, MoSLoRAError):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not str(trace.tb_frame.f_globals.get("__name__", "")).startswith("moslora."):
        return False
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno).strip()
    return line.startswith(("raise ", "raise("))


def frame_of(error: BaseException) -> str | None:
    """Return what was added to an error; None if nothing was."""
    notes = getattr(error, "__notes__", ())
    return next((note for note in notes if note.startswith(START)), None)


def add_frame(error: BaseException, doing: str, advice: str = "") -> None:
    """Note on another library's error what was being done, and what to do; the innermost note stays.

    Args:
        error: What was raised; one of ours is left as it is.
        doing: What was being done, as ``exporting an adapter``.
        advice: What to do after that, as how to continue.
    """
    if is_ours(error) or not isinstance(error, Exception) or frame_of(error):
        return
    text = f"{type(error).__mro__} {error}"
    way = next((way for pattern, way in ADVICE if re.search(pattern, text)), NOT_FORESEEN)
    error.add_note(" ".join(part for part in (f"{START}{doing}.", way, advice) if part))


@contextlib.contextmanager
def verb(name: str) -> Iterator[None]:
    """Do what a verb does: report nothing to anyone, and let no error of another library come without a word.

    Args:
        name: A key of ``DOING``.

    Raises:
        DiskFullError: Where a disk is full.
    """
    doing = DOING[name]
    with no_telemetry():
        try:
            yield
        except Exception as error:
            raise_if_full(error, None, "do the same again; nothing unfinished is left.")
            add_frame(error, doing)
            raise
