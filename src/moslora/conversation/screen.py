"""Answers as they come: in columns side by side, one below the other where the terminal is narrow, or as lines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from moslora.conversation.chat import Turn
from moslora.display import Display
from moslora.wording import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["LEAST_COLUMN", "Screen"]

LEAST_COLUMN = 34  # characters; with less for each model, answers stand one below the other
ENDED = {"length": "… (longest answer reached)", "interrupted": "… (stopped)"}
STYLES = ("bold cyan", "bold green", "bold magenta", "bold yellow", "bold blue")


class Screen:
    """Shows the answers of one turn while they are written.

    Args:
        display: Where to.
        names: Who answers.
    """

    def __init__(self, display: Display, names: Sequence[str]) -> None:
        self.display, self.names = display, list(names)
        self.texts = dict.fromkeys(self.names, "")
        self.live: Any = None
        self.begun: str | None = None

    @property
    def is_wide(self) -> bool:
        """Whether there is room for a column of each."""
        return self.display.console.width >= (LEAST_COLUMN + 3) * len(self.names)

    @contextlib.contextmanager
    def turn(self) -> Iterator[Screen]:
        """Show what ``write`` receives inside the block."""
        self.texts, self.begun = dict.fromkeys(self.names, ""), None
        console = self.display.console
        if self.display.quiet or not console.is_terminal or not self.is_wide:
            yield self
            return
        from rich.live import Live

        with Live(self._columns(), console=console, refresh_per_second=8, transient=True) as live:
            self.live = live
            try:
                yield self
            finally:
                self.live = None

    def write(self, name: str, text: str) -> None:
        """Show an answer as far as it is written.

        Args:
            name: Whose.
            text: From its beginning.
        """
        before, self.texts[name] = self.texts[name], text
        if self.live is not None:
            self.live.update(self._columns(tail=True))
        elif self.display.console.is_terminal and not self.display.quiet:
            if self.begun != name:
                self.display.say("" if self.begun is None else "\n")
                self.display.say(name, style=self._style(name))
                self.begun, before = name, ""
            # What was shown stays; a tokenizer seldom takes back what it has decoded.
            self.display.go_on(text[len(before) :])

    def done(self, turn: Turn) -> None:
        """Show the answers whole, where they are not on the screen already.

        Args:
            turn: The turn.
        """
        console = self.display.console
        ends = {reply.model: ENDED.get(reply.ended, "") for reply in turn.replies}
        self.texts = {reply.model: reply.text for reply in turn.replies}
        if console.is_terminal and self.is_wide:
            self.display.show(self._columns(ends=ends))
        elif console.is_terminal:
            self.display.say()
            for name, end in ends.items():
                if end:
                    self.display.say(f"{name} {end}", style="dim")
        else:
            for reply in turn.replies:
                lines = (reply.text or "(nothing)").split("\n")
                end = f" {ends[reply.model]}" if ends[reply.model] else ""
                self.display.say(f"{reply.model}: {lines[0]}{end if len(lines) == 1 else ''}")
                for number, line in enumerate(lines[1:], 2):
                    self.display.say(f"  {line}{end if number == len(lines) else ''}")

    def _style(self, name: str) -> str:
        return STYLES[self.names.index(name) % len(STYLES)]

    def _columns(self, tail: bool = False, ends: dict[str, str] | None = None) -> RenderableType:
        """Lay the answers out side by side; while they grow, only their last lines that fit the screen."""
        from rich.table import Table
        from rich.text import Text

        console = self.display.console
        table = Table.grid(padding=(0, 3), expand=True)
        for _ in self.names:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*(Text(name, style=self._style(name)) for name in self.names))
        width = console.width // len(self.names) - 3
        cells = []
        for name in self.names:
            text = Text(printable(self.texts[name]))
            lines = text.wrap(console, max(width, 8)) if tail else None
            room = max(console.height - 4, 1)
            if lines is not None and len(lines) > room:
                text = Text("\n").join(lines[-room:])
            if ends and ends.get(name):
                text.append(f" {ends[name]}", style="dim")
            cells.append(text)
        table.add_row(*cells)
        return table
