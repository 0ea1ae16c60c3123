from __future__ import annotations

import io

import pytest

import moslora.display
from moslora.display import Display


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_away_from_a_terminal_progress_is_plain_lines_without_escapes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moslora.display, "PLAIN_INTERVAL", 0.0)
    stream = io.StringIO()
    display = Display(stream)
    with display.progress("Training", 3) as progress:
        for step in range(3):
            progress.advance(note=f"loss {3 - step}")
    assert stream.getvalue().splitlines() == [
        "Training 1/3  loss 3", "Training 2/3  loss 2", "Training 3/3  loss 1",
    ]  # fmt: skip


def test_plain_progress_is_rare_but_always_says_the_end() -> None:
    stream = io.StringIO()
    with Display(stream).progress("Answers", 100) as progress:
        for _ in range(100):
            progress.advance()
    assert stream.getvalue() == "Answers 100/100\n"


def test_on_a_terminal_it_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Display(stream).progress("Training", 2) as progress:
        progress.advance(2, "loss 0.1")
    assert "2/2" in stream.getvalue() and "loss 0.1" in stream.getvalue() and "\x1b[" in stream.getvalue()


def test_a_users_text_is_no_markup() -> None:
    stream = io.StringIO()
    display = Display(stream)
    display.say("[red]keep[/red] [1, 2] /a/path")
    display.warn("[bold]mind[/bold]")
    assert stream.getvalue() == "[red]keep[/red] [1, 2] /a/path\nWarning: [bold]mind[/bold]\n"


def test_quiet_keeps_warnings() -> None:
    stream = io.StringIO()
    display = Display(stream, quiet=True)
    display.say("progress")
    display.table("t", ["a"], [["b"]])
    display.warn("trouble")
    assert stream.getvalue() == "Warning: trouble\n"
