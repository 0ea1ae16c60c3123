"""Running a verb: what it raises becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import gc
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from moslora.terminal import guarded_streams, print_error, print_json, print_traceback

if TYPE_CHECKING:
    from moslora.display import Printable


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind what is being done, so that what was half written is removed.

    Training has its own way of stopping, which takes over while it lasts.
    """

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def quick_import() -> Iterator[None]:
    """Import within the block with the garbage collector off, and let it leave alone what is there at the end.

    What torch makes when it is imported stays. To look through it several times, and once more at exit, takes a third
    of the time of a short verb.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def run_verb(action: Callable[[], None], debug: bool, together: bool = False) -> None:
    """Run a verb, and turn what it raises into a message and an exit code; ``together`` knows of other processes."""
    from moslora.api.calling import called_as
    from moslora.distributed import launched
    from moslora.errors import MoSLoRAError, Stopped, UsageError
    from moslora.failures import verb
    from moslora.terminal import hide_known_warnings

    hide_known_warnings()
    name = action.__qualname__.partition(".")[0].rstrip("_")  # of the function that it is in
    problem: Exception
    with _ended_by_sigterm(), guarded_streams(), called_as(shlex.join(["moslora", *sys.argv[1:]])):
        try:
            with verb(name):
                if not together and launched() > 1:
                    raise UsageError(
                        f"{launched()} processes were launched, and each would do all of this; moslora train alone "
                        "shares its work between processes. Start this one without torchrun or accelerate launch."
                    )
                action()
        except typer.Exit:
            raise
        except Stopped as stopped:
            raise typer.Exit(128 + stopped.signal_number) from None
        except KeyboardInterrupt:
            print_error("Interrupted.")
            raise typer.Exit(128 + signal.SIGINT) from None
        except MoSLoRAError as error:
            code, problem = error.exit_code, error
        except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
            code, problem = 2, error
        except Exception as error:
            code, problem = 1, error
        else:
            return
    if debug:
        print_traceback(problem)
    else:
        print_error(_in_words(problem))
    raise typer.Exit(code)


def _in_words(problem: Exception) -> str:
    """Return the message of an error; of another library's with its type, what was being done, and what to do."""
    from moslora.failures import frame_of, is_ours

    if is_ours(problem):
        return f"Error: {problem}"
    text = str(problem) or "it says nothing more"
    if isinstance(problem, OSError) and problem.filename is not None:
        text = f"{problem.filename}: {problem.strerror}"
    return f"Error: {type(problem).__name__}: {text}\n{frame_of(problem) or ''}".rstrip()


def print_result(result: Printable, as_json: bool) -> None:
    """Print a verb's result on standard output, for people or as JSON."""
    if as_json:
        print_json(result.to_dict())
    else:
        from moslora.display import Display

        result.show(Display())
