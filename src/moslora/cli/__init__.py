"""The command ``moslora``: parse, call, print. Every verb imports what it needs inside itself.

Exit codes: 0 proven, 1 a failed proof or run, 2 wrong usage or unusable input, 130 and 143 interrupted by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moslora.cli.adapters import combine, doctor, export, import_, inspect_, merge, push
from moslora.cli.chatting import chat
from moslora.cli.judging import compare, evaluate, report
from moslora.cli.studio import studio
from moslora.cli.training import advise, mix, plan, train
from moslora.wording import printable

__all__ = ["app", "main"]


class _Verbs(TyperGroup):
    """The verbs; what typer finds wrong with their arguments is shown without obeying what they hold."""

    def make_context(self, *args: Any, **how: Any) -> Any:
        with _plain_usage_errors():
            return super().make_context(*args, **how)

    def invoke(self, *args: Any, **how: Any) -> Any:
        with _plain_usage_errors():
            return super().invoke(*args, **how)


@contextlib.contextmanager
def _plain_usage_errors() -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        error: Any = problem
        # Click's exceptions, which newer versions of typer have a copy of.
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            error.message = printable(error.message)
        raise


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Mixture-of-Subspaces LoRA: train with a mixer, ship a plain LoRA, know whether it helped.\n\n"
        "Exit codes: 0 proven, 1 a failed proof or run, 2 wrong usage, 130 interrupted."
    ),
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"moslora {version('moslora')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold the options that belong to no verb."""


VERBS: dict[str, Callable[..., None]] = {  # in the order of --help
    "train": train,
    "advise": advise,
    "plan": plan,
    "compare": compare,
    "evaluate": evaluate,
    "chat": chat,
    "report": report,
    "export": export,
    "import": import_,
    "combine": combine,
    "mix": mix,
    "merge": merge,
    "inspect": inspect_,
    "doctor": doctor,
    "push": push,
    "studio": studio,
}
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)


def main() -> None:
    """Run the command; what the shell calls."""
    app()
