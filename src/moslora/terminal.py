r"""The way to the terminal of text that others wrote: data, names of files, columns, modules and bases, their errors.

A terminal obeys control characters: they move the cursor, rename the window, write the clipboard, turn the order of
what is read around. Everything that this package shows passes here, and they come out as what they are, ``\x1b`` say.
``Display`` draws with the console of ``make_console``; the command runs its verbs inside ``guarded_streams``, where
warnings, logs and bars of other libraries are treated alike.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from moslora.wording import printable

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "guarded_streams",
    "hide_known_warnings",
    "make_console",
    "print_error",
    "print_json",
    "print_traceback",
    "unguarded",
    "warn",
]

# What a bar of tqdm begins with to draw over itself, and how it moves between several bars.
_REDRAWN = re.compile(r"\r|(?:\n|\x1b\[A)+\Z")


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.segment import Segment

    class PlainConsole(Console):
        """A console of rich that obeys nothing inside text: no markup, no emoji codes, no control characters."""

        def render_str(self, text: str, **how: Any) -> Any:
            return super().render_str(printable(text), **how)

        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                # What moves rich's own bars is a control of its own, not text.
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    return PlainConsole


def make_console(stream: TextIO, **how: Any) -> Console:
    """Return a console of rich on which text stays text.

    Args:
        stream: Where it writes.
        **how: Further arguments of ``rich.console.Console``.
    """
    return _console_class()(
        file=unguarded(stream), highlight=False, markup=False, emoji=False, soft_wrap=True, **how
    )


class _Guarded:
    """A text stream through which no control character passes; all but writing is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    def write(self, text: str) -> int:
        start = _REDRAWN.match(text)
        head = start[0] if start else ""
        self.unguarded.write(head + printable(text[len(head) :]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unguarded, name)


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Let no control character through standard output and error, whoever writes there, inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Guarded(unguarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: TextIO) -> TextIO:
    """Return the stream behind a guarded one, for writers that make text harmless themselves.

    Args:
        stream: Guarded or not.
    """
    return stream.unguarded if isinstance(stream, _Guarded) else stream


def print_error(text: object) -> None:
    """Write a line to standard error.

    Args:
        text: The line.
    """
    print(printable(text), file=unguarded(sys.stderr))


def print_traceback(error: BaseException) -> None:
    """Write an exception with all that led to it to standard error.

    Args:
        error: The exception.
    """
    print_error("".join(traceback.format_exception(error)).rstrip("\n"))


def print_json(value: Any) -> None:
    """Write a value as JSON to standard output.

    Args:
        value: Of JSON's types. Characters outside ASCII are escaped, as is DEL, which JSON lets through.
    """
    print(json.dumps(value, indent=2).replace("\x7f", "\\u007f"), file=unguarded(sys.stdout))


def warn(text: str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Raise a warning as Python's own, to be filtered as such, with names in it that are safe to show.

    Args:
        text: What to know, and what to do.
        category: Its class.
        stacklevel: As for ``warnings.warn``: 1 is the caller.
    """
    warnings.warn(printable(text), category, stacklevel=stacklevel + 1)


def hide_known_warnings() -> None:
    """Hide PEFT's use of a deprecated name of transformers 5: news for PEFT, and not for who runs this.

    It is for a process of the command's own; ``warnings.catch_warnings`` around it takes it back.
    """
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
