"""Running a verb: what it raises becomes a message and an exit code."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

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


def run_verb(action: Callable[[], None], debug: bool, together: bool = False) -> None:
    """Run a verb, and turn what it raises into a message and an exit code; ``together`` knows of other processes."""
    from moslora.distributed import launched
    from moslora.errors import MoSLoRAError, Stopped, UsageError

    # PEFT asks transformers 5 for a property under its old name: news for PEFT, not for who runs this.
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )
    with _ended_by_sigterm():
        try:
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
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(128 + signal.SIGINT) from None
        except MoSLoRAError as error:
            code, problem = error.exit_code, error
        except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
            code, problem = 2, error  # type: ignore[assignment]
        except Exception as error:
            code, problem = 1, error  # type: ignore[assignment]
        else:
            return
    if debug:
        raise problem
    known = type(problem).__module__.startswith("moslora") or isinstance(problem, ValueError | OSError)
    name = "" if known else f"{type(problem).__name__}: "
    print(f"Error: {name}{problem}", file=sys.stderr)
    if not known:
        print("Run again with --debug to see where it happened.", file=sys.stderr)
    raise typer.Exit(code)


def print_result(result: Printable, as_json: bool) -> None:
    """Print a verb's result on standard output, for people or as JSON."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        from moslora.display import Display

        result.show(Display())
