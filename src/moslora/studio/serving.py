"""Opening the page: where it listens, who may see it, and what a browser is told not to do."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import secrets
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moslora.compat.telemetry import no_telemetry
from moslora.display import Display
from moslora.errors import MissingPackageError, UsageError
from moslora.studio.workspace import Workspace

__all__ = ["Opened", "Settings", "opened"]

PASSWORD = "MOSLORA_STUDIO_PASSWORD"
LEAST_PASSWORD = 8  # characters
# What a browser may load for the page: what it serves itself, nothing else, and in nobody else's frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Settings:
    """How the page is served.

    Attributes:
        host: Address to listen on.
        port: Of it; 0 for one that is free.
        password: What a visitor has to give; None for nobody asked, on this machine alone.
        upload_mb: Largest file that may be uploaded, in MB of 10⁶ bytes.
        recipe: The recipe that the form begins with; None for an empty one.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    password: str | None = None
    upload_mb: int = 500
    recipe: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether it listens on this machine alone."""
        return is_loopback(self.host)


@dataclass(frozen=True)
class Opened:
    """A page that is served.

    Attributes:
        url: Where it is.
        blocks: gradio's.
        password: What is asked for; None for nothing.
    """

    url: str
    blocks: Any
    password: str | None

    def wait(self) -> None:
        """Serve until Ctrl-C or SIGTERM."""
        threading.Event().wait()


def is_loopback(host: str) -> bool:
    """Say whether an address is of this machine alone.

    Args:
        host: A name or an address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def password_for(host: str, given: str | None) -> tuple[str | None, bool]:
    """Return the password that visitors have to give, and whether it was made here.

    Args:
        host: Where the page listens.
        given: From the environment; None if there is none.

    Raises:
        UsageError: If it is too short to keep anybody out.
    """
    if given is not None and len(given) < LEAST_PASSWORD:
        raise UsageError(
            f"{PASSWORD} has {len(given)} characters; a password needs at least {LEAST_PASSWORD}."
        )
    if given is not None or is_loopback(host):
        return given, False
    return secrets.token_urlsafe(12), True


class Guard:
    """Stands before the page: hosts that are meant, and headers that keep a browser from loading anything elsewhere.

    A page of another site cannot speak to a page on this machine under a name of its own (DNS rebinding).

    Args:
        app: What it stands before.
        hosts: Names and addresses that may be asked for; empty for any, where a password is asked for.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] = ()) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope.get("headers") or ())
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0].strip("[]").lower()
        origin = headers.get(b"origin", b"").decode("latin-1")
        if self.hosts and (host not in self.hosts or not self._is_own(origin)):
            await _refuse(scope, send)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (name, value)
                    for name, value in message.get("headers", ())
                    if name.lower() not in (b"content-security-policy", b"referrer-policy")
                ]
                message["headers"] = [
                    *kept,
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _is_own(self, origin: str) -> bool:
        """Say whether a request comes from the page itself, or from no page."""
        if not origin:
            return True
        host = origin.partition("://")[2].rsplit(":", 1)[0].strip("[]").lower()
        return host in self.hosts


async def _refuse(scope: Scope, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = b"This page answers under its own address alone."
    await send(
        {
            "type": "http.response.start",
            "status": 403,
            "headers": [(b"content-type", b"text/plain; charset=utf-8")],
        }
    )
    await send({"type": "http.response.body", "body": text})


@contextmanager
def opened(workspace: Workspace, settings: Settings, display: Display) -> Iterator[Opened]:
    """Serve the page within the block.

    Args:
        workspace: The folders.
        settings: How.
        display: Where to tell.

    Raises:
        MissingPackageError: If gradio is not installed.
        UsageError: If the port is taken, or the password does not do.
    """
    password, is_made = password_for(settings.host, settings.password)
    with (
        tempfile.TemporaryDirectory(prefix="moslora-studio-") as folder,
        no_telemetry(),  # gradio asks for it when it is imported
        _environment(GRADIO_TEMP_DIR=str(Path(folder) / "uploads"), GRADIO_MCP_SERVER="False"),
    ):
        display.say("Importing what the page needs …")
        _import_page()
        with _launched(workspace, settings, password, Path(folder)) as (url, blocks):
            display.say(f"Studio, opens in a browser:   {url}")
            if is_made:
                display.say(f"It listens beyond this machine, so it asks for a password: {password}")
            elif password is not None:
                display.say("It asks for the password that was set. Any user name does.")
            yield Opened(url, blocks, password)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables that gradio reads, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _import_page() -> None:
    """Import what the page is made from, before anybody waits for it."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "The studio needs gradio, which is not installed: pip install 'moslora[studio]'"
        ) from error
    import matplotlib.figure  # noqa: F401


def _import_form() -> None:
    """Import what the form is made from."""
    from moslora.studio.form import fields_of_kind

    with contextlib.suppress(Exception):  # who opens the form is told
        fields_of_kind("text")


@contextmanager
def _launched(
    workspace: Workspace, settings: Settings, password: str | None, folder: Path
) -> Iterator[tuple[str, Any]]:
    from starlette.middleware import Middleware

    from moslora.studio.context import Studio
    from moslora.studio.page import STYLE, make_page, make_theme
    from moslora.studio.recipes import EMPTY

    downloads = folder / "uploads" / "downloads"
    downloads.mkdir(parents=True)
    studio = Studio.of(workspace, downloads, EMPTY)
    if settings.recipe is not None:
        studio.opening = studio.recipes.read(settings.recipe)
    blocks = make_page(studio, "runs" if settings.recipe is None else "train")
    hosts = ("127.0.0.1", "localhost", "::1", settings.host.strip("[]").lower()) if password is None else ()

    def allowed(_: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), str(password).encode())

    try:
        _, url, _ = blocks.launch(
            server_name=settings.host,
            server_port=settings.port or None,
            auth=None if password is None else allowed,
            auth_message="Any user name, and the password that the terminal shows.",
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            max_file_size=f"{settings.upload_mb}mb",
            blocked_paths=[str(workspace.private)],
            app_kwargs={
                "middleware": [Middleware(Guard, hosts=hosts)],
                "docs_url": None,
                "redoc_url": None,
                "openapi_url": None,
            },
            theme=make_theme(),
            # In the head, so that it is there before anything is drawn, and its selectors stay as they are.
            head=f"<style>{STYLE.read_text(encoding='utf-8')}</style>",
        )
    except OSError as error:
        raise UsageError(
            f"Port {settings.port} on {settings.host} cannot be listened on ({error}). Another page may be open there; "
            "choose another with --port, or 0 for any."
        ) from error
    try:
        # The form needs the trainers' configurations; whoever looks at runs meanwhile does not wait for them.
        threading.Thread(target=_import_form, daemon=True).start()
        yield url, blocks
    finally:
        blocks.close(verbose=False)
