"""What a person sees while something runs.

``Display`` writes colors and a moving bar on a terminal, plain lines elsewhere; ``NotebookDisplay`` draws in a
notebook; ``Silence`` is what the Python API has by default, and raises warnings as Python's own.
"""

from __future__ import annotations

import dataclasses
import html
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from moslora.errors import UsageError
from moslora.terminal import make_console, unguarded, warn
from moslora.wording import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["Display", "NotebookDisplay", "Printable", "Progress", "Silence", "find_display"]

# Seconds between plain progress lines, so that a log file stays readable.
PLAIN_INTERVAL = 10.0
# Seconds between redrawings of a notebook's bar, each of which is a message to the browser.
NOTEBOOK_INTERVAL = 0.2


class Progress:
    """How far something is; made by ``Display.progress``.

    Args:
        total: Steps in all.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.note = ""

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Count steps.

        Args:
            steps: How many were done.
            note: What to show beside the count, as ``loss 0.31``.
        """
        self.done += steps
        self.note = self.note if note is None else note
        self.show()

    def show(self) -> None:
        """Draw the state; displays replace it."""


class Display:
    """Writes for people.

    Args:
        stream: Where to; standard output if None.
        quiet: Write nothing but warnings.
    """

    def __init__(self, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.stream = unguarded(sys.stdout if stream is None else stream)
        # Away from a terminal rich would cut lines at 80 columns; a log wants them whole.
        width = None if self.stream.isatty() else 160
        self.console: Console = make_console(self.stream, width=width)
        self.quiet = quiet

    def say(self, text: str = "", style: str | None = None) -> None:
        """Write a line; brackets in it are not markup, and control characters are shown, not obeyed.

        Args:
            text: The line.
            style: A rich style, seen on a terminal only.
        """
        if not self.quiet:
            self.console.print(text, style=style)

    def go_on(self, text: str) -> None:
        """Write more of a line that is not ended yet, as a model writes it.

        Args:
            text: What comes next; control characters are shown, not obeyed.
        """
        if not self.quiet:
            self.console.print(printable(text), end="")

    def warn(self, text: str) -> None:
        """Write a warning.

        Args:
            text: What to know, and what to do.
        """
        self.console.print(f"Warning: {text}", style="yellow")

    def show(self, renderable: RenderableType) -> None:
        """Write a rich table or text.

        Args:
            renderable: Anything that rich can draw.
        """
        if not self.quiet:
            self.console.print(renderable)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Write a table whose first column is text and the others numbers.

        Args:
            title: Its heading.
            columns: Names.
            rows: Cells, as many as columns each.
        """
        from rich import box
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        for index, name in enumerate(columns):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.show(table)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """Show how far something is.

        Args:
            description: What it is.
            total: Steps in all.

        Yields:
            The state to advance.
        """
        if self.quiet:
            yield Progress(total)
        elif self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            with Bar(*columns, console=self.console) as bar:
                task = bar.add_task(description, total=total, note="")
                state = Progress(total)
                state.show = lambda: bar.update(task, completed=state.done, note=state.note)  # type: ignore[method-assign]
                yield state
        else:
            state = _PlainProgress(total, description, self)
            yield state


class _PlainProgress(Progress):
    def __init__(self, total: int, description: str, display: Display) -> None:
        super().__init__(total)
        self.description = description
        self.display = display
        self.last = time.monotonic()

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last >= PLAIN_INTERVAL or self.done >= self.total:
            self.last = now
            note = f"  {self.note}" if self.note else ""
            self.display.say(f"{self.description} {self.done}/{self.total}{note}")


class Silence(Display):
    """Shows nothing; a warning becomes a Python ``UserWarning``."""

    def __init__(self) -> None:
        super().__init__(io.StringIO(), quiet=True)

    def warn(self, text: str) -> None:
        """Raise a warning as Python's own, to be filtered as such."""
        warn(text, stacklevel=2)


class NotebookDisplay(Display):
    """Draws in a Jupyter notebook: lines and tables as text, and one bar per stage that moves in place.

    Raises:
        UsageError: If IPython is not installed.
    """

    def __init__(self) -> None:
        try:
            import IPython.display  # noqa: F401
        except ImportError:
            raise UsageError(
                "progress='notebook' needs IPython, which every notebook has; elsewhere use progress='terminal'."
            ) from None
        super().__init__()

    def say(self, text: str = "", style: str | None = None) -> None:
        """Write a line; paths below the current folder are written from there on, so that a notebook can be shared."""
        super().say(text.replace(f"{Path.cwd()}{os.sep}", ""), style)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Progress]:
        """Show a bar that moves in place."""
        from IPython.display import HTML, display

        state = _NotebookProgress(total, description)
        handle = display(HTML(state.html()), display_id=True)
        state.update = lambda: handle.update(HTML(state.html()))
        yield state
        state.update()


class _NotebookProgress(Progress):
    def __init__(self, total: int, description: str) -> None:
        super().__init__(total)
        self.description = description
        self.update: Any = lambda: None
        self.last = 0.0

    def show(self) -> None:
        now = time.monotonic()
        if now - self.last >= NOTEBOOK_INTERVAL or self.done >= self.total:
            self.last = now
            self.update()

    def html(self) -> str:
        what = html.escape(printable(self.description))
        note = f" {html.escape(printable(self.note))}" if self.note else ""
        return (
            f"<div>{what} <progress value='{self.done}' max='{self.total}'></progress> "
            f"{self.done}/{self.total}{note}</div>"
        )


def find_display(progress: str | Display | None) -> Display:
    """Return the display that the Python API's ``progress=`` names.

    Args:
        progress: None for silence, ``"terminal"``, ``"notebook"``, or a display of your own.

    Raises:
        UsageError: If it is something else.
    """
    if isinstance(progress, Display):
        return progress
    known: dict[str | None, type[Display]] = {None: Silence, "terminal": Display, "notebook": NotebookDisplay}
    if not isinstance(progress, str | None) or progress not in known:
        raise UsageError(f"progress={progress!r} must be None, 'terminal', 'notebook' or a moslora Display.")
    return known[progress]()


class Printable:
    """A result that reads well: ``show`` writes it on a display, and ``repr`` is the same as plain text."""

    def show(self, display: Display) -> None:
        """Write the result for people.

        Args:
            display: Where to.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Return the result for programs: what ``--json`` prints."""
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    def __repr__(self) -> str:
        display = Display(stream := io.StringIO())
        # Whatever surrounds it, a terminal or a notebook, it is text that is wanted.
        display.console = make_console(
            stream, width=160, no_color=True, force_terminal=False, force_jupyter=False
        )
        self.show(display)
        return "\n".join(line.rstrip() for line in stream.getvalue().strip("\n").splitlines())
