"""The page of the verb studio, opened in one call; its functions are this API's own."""

from __future__ import annotations

import os
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from moslora.display import Display, find_display

__all__ = ["serve"]


def serve(
    folder: str | os.PathLike[str] = ".",
    *,
    recipe: str | None = None,
    allow: Sequence[str | os.PathLike[str]] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload: int = 500,
    browser: bool = False,
    progress: str | Display | None = None,
) -> None:
    """Serve the studio until Ctrl-C or SIGTERM.

    Args:
        folder: Where it works; made if it does not exist.
        recipe: A recipe that the form begins with. Its folder may be read, too.
        allow: Other folders that may be read.
        host: Address to listen on. Beyond this machine the password of ``MOSLORA_STUDIO_PASSWORD`` is asked for, or
            one that is made and shown.
        port: Of it; 0 for one that is free.
        max_upload: Largest upload, in MB.
        browser: Whether to open the page in this machine's browser.
        progress: Where to tell of it; None for silence.

    Raises:
        MissingPackageError: If gradio is not installed.
        UsageError, RecipeError: If something cannot be used.
    """
    from moslora.studio.serving import PASSWORD, Settings, opened
    from moslora.studio.workspace import Workspace

    others = [Path(one) for one in allow]
    name = None
    if recipe is not None:
        path = Path(os.path.expanduser(recipe)).absolute()  # noqa: PTH111 - Path's raises for an unknown user
        name = str(path)
        others.append(path.parent)
    workspace = Workspace.open(Path(folder), tuple(others))
    settings = Settings(host, port, os.environ.get(PASSWORD) or None, max_upload, name)
    with opened(workspace, settings, find_display(progress)) as page:
        if browser:
            webbrowser.open(page.url)
        page.wait()
