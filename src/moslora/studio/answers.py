"""What a verb says, and what it raises, as something to show: never a stack trace."""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moslora.display import Display, Printable, Progress
from moslora.errors import DataError, UsageError
from moslora.failures import frame_of, is_ours
from moslora.studio.markup import escape, notice
from moslora.terminal import make_console
from moslora.wording import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["ONE_AT_A_TIME", "PageDisplay", "answered", "error_box", "shown", "whole"]

# Verbs change what belongs to the process (environment, warnings, random numbers), so one does its work at a time.
ONE_AT_A_TIME = threading.RLock()
WIDTH = 110  # characters, of tables

logger = logging.getLogger(__name__)


class PageDisplay(Display):
    """Keeps what a verb shows as HTML.

    Args:
        on_change: Called when there is more.
    """

    def __init__(self, on_change: Callable[[], None] = lambda: None) -> None:
        super().__init__(io.StringIO())
        self.console = make_console(io.StringIO(), width=WIDTH, force_terminal=False, legacy_windows=False)
        self.pieces: list[str] = []
        self.warnings: list[str] = []
        self.lines: list[str] = []
        self.step = ""
        self.on_change = on_change

    def say(self, text: str = "", style: str | None = None) -> None:
        """Keep a line."""
        self.lines.append(text)
        self._keep(f'<span class="{escape(style)}">{escape(text)}</span>\n' if style else f"{escape(text)}\n")

    def go_on(self, text: str) -> None:
        """Keep more of a line."""
        self._keep(escape(text))

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)
        self._keep(f'<span class="yellow">{escape(f"Warning: {text}")}</span>\n')

    def show(self, renderable: RenderableType) -> None:
        """Keep a table or a text of rich."""
        lines = self.console.render_lines(renderable, pad=False)
        self._keep("".join("".join(_span(segment) for segment in line) + "\n" for line in lines))

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """Keep how far something is, the newest state only."""
        state = Progress(total)

        def show() -> None:
            self.step = f"{description} {state.done}/{total} {state.note}".rstrip()
            self.on_change()

        state.show = show  # type: ignore[method-assign]
        yield state
        self.step = ""

    @property
    def html(self) -> str:
        """All that was shown."""
        end = f"{escape(self.step)}\n" if self.step else ""
        text = "".join(self.pieces) + end
        return f'<pre class="output" tabindex="0" role="log" aria-label="What it said">{text}</pre>'

    def _keep(self, piece: str) -> None:
        self.pieces.append(piece)
        self.on_change()


def _span(segment: Any) -> str:
    """Return a piece of rich's as a span whose classes are its color and weight."""
    style = segment.style
    words = []
    if style is not None:
        color = style.color.name if style.color is not None else ""
        words = [
            w
            for w in (color.replace("_", "-"), "bold" if style.bold else "", "dim" if style.dim else "")
            if w
        ]
    text = escape(segment.text)
    return f'<span class="{escape(" ".join(words))}">{text}</span>' if words else text


def shown(result: Printable) -> str:
    """Return a verb's result as the command prints it, with its colors.

    Args:
        result: Of a verb.
    """
    display = PageDisplay()
    result.show(display)
    return display.html


def whole(text: str | None, what: str) -> int | None:
    """Return the whole number that a person typed; None for nothing.

    Args:
        text: What was typed.
        what: The name of the field.

    Raises:
        UsageError: If it is something else.
    """
    if not text or not text.strip():
        return None
    if not text.strip().isdecimal() or len(text.strip()) > 12:
        raise UsageError(f"{what} is {text.strip()[:40]!r}; it must be a whole number, or empty.")
    return int(text)


def error_box(error: BaseException) -> str:
    """Return an error in words, as the command says it.

    Args:
        error: What was raised. A fault of data is listed line by line.
    """
    if isinstance(error, DataError):
        further = f"<li>and {error.further} more</li>" if error.further else ""
        lines = "".join(f"<li>{escape(fault)}</li>" for fault in error.faults)
        count = len(error.faults) + error.further
        return (
            f'<div class="notice error" role="alert"><b>{escape(error.source)}: {count} '
            f"fault{'s' * (count > 1)}</b><ul>{lines}{further}</ul>{escape(error.advice)}</div>"
        )
    if is_ours(error):
        return notice("error", str(error) or type(error).__name__)
    text = str(error) or "it says nothing more"
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    logger.warning("While answering the page", exc_info=error)  # for the terminal; the page has the message
    return notice("error", f"{type(error).__name__}: {printable(text)}\n{frame_of(error) or ''}".rstrip())


@contextmanager
def answered(into: list[str]) -> Iterator[None]:
    """Turn what the block raises into a box.

    Args:
        into: Receives it.
    """
    try:
        with ONE_AT_A_TIME:
            yield
    except Exception as error:
        into.append(error_box(error))
