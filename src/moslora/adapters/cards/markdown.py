"""Text that others wrote, as Markdown shows it and does not obey it: no markup, HTML, links or lines of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from moslora.wording import one_line, printable

__all__ = ["code", "fenced", "literal", "plain", "table"]

LONGEST = 300  # characters of a name


def plain(text: object) -> str:
    r"""Return a text on one line with every character that Markdown or HTML would obey escaped.

    Args:
        text: What others wrote.

    Example:
        >>> plain("a*b <img src=x>")
        'a\\*b &lt;img src=x&gt;'
    """
    line = printable(one_line(text, LONGEST))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"([\\`*_{}\[\]#+!|~$])", r"\\\1", line)
    return re.sub(r"(https?|ftp):", r"\1&#58;", re.sub(r"^([-=])", r"\\\1", line)).replace("@", "&#64;")


def code(text: object) -> str:
    r"""Return a text as a code span, in a table too.

    Args:
        text: What others wrote.

    Example:
        >>> code("a|b`c")
        '``a\\|b`c``'
    """
    line = printable(one_line(text, LONGEST)).replace("|", "\\|") or " "
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def literal(text: str) -> str:
    """Return a text as a literal of Python, ASCII alone.

    Args:
        text: What others wrote.
    """
    return json.dumps(text).replace("\x7f", "\\u007f")


def fenced(language: str, lines: Sequence[str]) -> list[str]:
    """Return lines as a block of code that nothing in them can end.

    Args:
        language: Of the block.
        lines: Its content.
    """
    content = [printable(line) for line in lines]
    longest = max((len(run) for line in content for run in re.findall(r"`+", line)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *content, fence]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of cells that are Markdown already.

    Args:
        columns: Its head.
        rows: As many cells each.
    """
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
