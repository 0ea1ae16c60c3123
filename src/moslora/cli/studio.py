"""The verb that opens a page: studio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moslora.cli.options import Debug
from moslora.cli.running import run_verb
from moslora.display import Display


def studio(
    folder: Annotated[
        Path, typer.Argument(help="Where it works: runs are looked for and written below it.")
    ] = Path(),
    recipe: Annotated[
        str | None,
        typer.Option(help="A recipe that the form begins with.", metavar="FILE", show_default=False),
    ] = None,
    allow: Annotated[
        list[Path] | None,
        typer.Option(help="Another folder that may be read; may be given several times.", show_default=False),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Beyond this machine a password is asked for.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 for one that is free.", min=0, max=65535)] = 7860,
    max_upload: Annotated[int, typer.Option(help="Largest upload, in MB.", min=1)] = 500,
    browser: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in the browser of this machine.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Open a page in the browser: runs, training, comparisons, adapters and chat, over the same recipes and runs.

    [bold]moslora studio[/]
    [bold]moslora studio my-project --recipe recipes/demo.yaml --open[/]
    [bold]MOSLORA_STUDIO_PASSWORD=... moslora studio --host 0.0.0.0[/]

    It needs the extra [bold]moslora[studio][/], and no network. What it starts runs in processes of its own and goes on
    if the page is closed; what the command starts is seen in it. It reads no file outside of FOLDER and --allow. Beyond
    this machine it asks for the password in MOSLORA_STUDIO_PASSWORD, or for one that it makes and shows.
    """

    def action() -> None:
        from moslora.api.serving import serve

        serve(
            folder,
            recipe=recipe,
            allow=allow or (),
            host=host,
            port=port,
            max_upload=max_upload,
            browser=browser,
            progress=Display(),
        )

    run_verb(action, debug)
