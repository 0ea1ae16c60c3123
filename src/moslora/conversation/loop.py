"""Reading questions and commands, from a terminal or from a pipe, and what Ctrl-C does."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TextIO

from moslora.conversation.chat import Chat
from moslora.conversation.screen import Screen
from moslora.conversation.transcript import Transcript
from moslora.display import Display
from moslora.errors import EncodingError, UsageError
from moslora.wording import did_you_mean

__all__ = ["COMMANDS", "converse"]

COMMANDS = {
    "/reset": "forget what was said",
    "/system": "begin anew with this system turn; without a text, with none",
    "/help": "show this",
    "/quit": "leave, as Ctrl-D does",
}
PROMPT = "you: "


class _Interrupts:
    """Counts Ctrl-C since the last line: the first stops what is being said, the second leaves."""

    def __init__(self) -> None:
        self.count = 0
        self.answering = False

    def begin_line(self) -> None:
        self.count = 0

    def is_stopped(self) -> bool:
        return self.count > 0

    def __call__(self, number: int, frame: object) -> None:
        self.count += 1
        if self.count > 1 or not self.answering:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
            yield
            return
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def converse(
    chat: Chat, display: Display, stream: TextIO | None = None, transcript: Transcript | None = None
) -> None:
    """Read questions until there are no more, and show the answers.

    Args:
        chat: The conversation.
        display: Where answers are shown.
        stream: Where questions come from, one a line; standard input if None.
        transcript: Where every turn is kept.

    Raises:
        KeyboardInterrupt: If Ctrl-C was pressed twice.
    """
    stream = sys.stdin if stream is None else stream
    is_interactive = stream.isatty()
    if is_interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and recalled then
        display.say("/help lists the commands; Ctrl-C stops an answer, twice leaves.", style="dim")
    interrupts, screen = _Interrupts(), Screen(display, chat.subjects.names)
    if transcript is not None:
        transcript.append({"chat": chat.identity(), "time": _now()})
    with interrupts.heard():
        while True:
            try:
                line = _next_line(stream, is_interactive)
            except KeyboardInterrupt:
                if interrupts.count > 1:
                    raise
                display.say("\nCtrl-C once more leaves.")
                continue
            if line is None:
                return
            interrupts.begin_line()
            text = line.strip()
            if text.startswith("//"):
                text = text[1:]  # a question that begins with a slash
            elif text.startswith("/"):
                if not _obey(chat, display, text):
                    return
                continue
            if not text:
                continue
            if not is_interactive:
                display.say(f"> {text}")
            interrupts.answering = True
            try:
                with screen.turn():
                    turn = chat.ask(text, screen.write, interrupts.is_stopped)
            except (EncodingError, UsageError) as error:
                display.warn(str(error))
                continue
            finally:
                interrupts.answering = False
            screen.done(turn)
            if turn.was_interrupted:
                display.say("Stopped; this turn is not part of the conversation.")
            if transcript is not None:
                transcript.append(
                    {"turn": chat.asked, **dataclasses.asdict(turn), "system": chat.system, "time": _now()}
                )


def _next_line(stream: TextIO, is_interactive: bool) -> str | None:
    """Return the next line, None at the end."""
    try:
        if is_interactive:
            return input(PROMPT)
        line = stream.readline()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"A line of the input is not UTF-8 ({error.reason}). Convert it, as with iconv."
        ) from error
    return line or None


def _obey(chat: Chat, display: Display, text: str) -> bool:
    """Carry out a command; return whether the conversation goes on."""
    name, _, rest = text.partition(" ")
    actions: dict[str, Callable[[Chat, Display, str], None]] = {
        "/reset": _reset,
        "/system": _set_system,
        "/help": _help,
    }
    if name == "/quit":
        return False
    if name in actions:
        actions[name](chat, display, rest.strip())
        return True
    display.warn(
        f"{name} is not a command ({', '.join(COMMANDS)}).{did_you_mean(name, COMMANDS)} A question that begins "
        "with / is written with //."
    )
    return True


def _reset(chat: Chat, display: Display, _: str) -> None:
    chat.reset()
    display.say("What was said is forgotten.")


def _help(_: Chat, display: Display, __: str) -> None:
    for name, what in COMMANDS.items():
        display.say(f"{name}  {what}")


def _set_system(chat: Chat, display: Display, text: str) -> None:
    try:
        chat.set_system(text)
    except (EncodingError, UsageError) as error:
        display.warn(str(error))
        return
    display.say(
        "A new conversation, with that system turn." if text else "A new conversation, without a system turn."
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
