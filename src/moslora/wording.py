"""Words of messages: the nearest valid name, the first line of an error, durations and figures."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = [
    "did_you_mean",
    "duration",
    "evenly_spaced",
    "figure",
    "first_line",
    "nearest",
    "one_line",
    "printable",
]

T = TypeVar("T")
LONGEST_NAME = 300  # characters

# What a terminal or a page obeys instead of showing: control characters but tab and line feed, marks that turn the
# order of reading around, separators of lines that look like nothing, invisible tags, and lone surrogates, which stand
# for bytes that are not UTF-8 and cannot be written.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_UNDECODED = (
    0xDC00  # with a byte from 0x80 on added: how Python keeps a byte of a file's name that is not UTF-8
)


def nearest(word: object, known: Iterable[object], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like ``word``, or None.

    Args:
        word: What was written.
        known: Valid names.
        cutoff: The least likeness, from 0 to 1.
    """
    text = str(word)
    if (
        len(text) > LONGEST_NAME
    ):  # the comparison takes the square of the length, and a page of text is no name
        return None
    return next(iter(difflib.get_close_matches(text, [str(name) for name in known], 1, cutoff)), None)


def did_you_mean(word: object, known: Iterable[object], cutoff: float = 0.6) -> str:
    """Return `` Did you mean 'x'?`` with the nearest known name, to add to a sentence; empty if none is near.

    Args:
        word: What was written.
        known: Valid names.
        cutoff: The least likeness, from 0 to 1.

    Example:
        >>> "No task is named 'vison'." + did_you_mean("vison", ["text", "vision"])
        "No task is named 'vison'. Did you mean 'vision'?"
    """
    name = nearest(word, known, cutoff)
    return "" if name is None else f" Did you mean {name!r}?"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(text: object, length: int = 160) -> str:
    """Return a text on one line, cut to ``length`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else line[: length - 1] + "…"


def printable(text: object) -> str:
    r"""Return a text that shows its control characters instead of being obeyed.

    Line feeds and tabs stay; a carriage return before a line feed is dropped.

    Args:
        text: What others wrote.

    Example:
        >>> printable("a\x1b[2J\u202eb\udcff")
        'a\\\\x1b[2J\\\\u202eb\\\\xff'
    """
    return _OBEYED.sub(_shown, str(text).replace("\r\n", "\n"))


def _shown(found: re.Match[str]) -> str:
    code = ord(found[0])
    if _UNDECODED + 0x80 <= code <= _UNDECODED + 0xFF:
        code -= _UNDECODED
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def duration(seconds: float) -> str:
    """Return a duration in words.

    Example:
        >>> duration(3.14159), duration(75), duration(4000)
        ('3.1 s', '1 min 15 s', '1 h 6 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def figure(value: float) -> str:
    """Return a number with three significant digits, without an exponent where that is readable.

    Example:
        >>> figure(0.01234), figure(123456.0), figure(0.0)
        ('0.0123', '1.23e+05', '0')
    """
    if value == 0 or 0.001 <= abs(value) < 100_000:
        digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{min(digits, 5)}f}"
    return f"{value:.2e}"


def size_in_words(size: float) -> str:
    """Return a number of bytes in words, as ``3.1 MB``."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def evenly_spaced(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items at even distances, the first and the last among them."""
    if count <= 0 or len(items) <= count:
        return list(items)[: max(count, 0)]
    return [items[round(k * (len(items) - 1) / max(count - 1, 1))] for k in range(count)]


def figure_or_dash(value: float | None) -> str:
    """Return a figure with three significant digits.

    Args:
        value: The figure; None if there is none.
    """
    if value is None:
        return "–"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.1e}"
