"""Laws for every verb: nothing leaves the machine, and nothing that others wrote is obeyed by a terminal or a page."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import pytest
from huggingface_hub.utils import _telemetry
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moslora
from moslora.cli import VERBS, app
from moslora.compat.telemetry import CONSTANTS, ENVIRONMENT, no_telemetry
from moslora.display import Display, Silence, _NotebookProgress
from moslora.failures import DOING, verb
from moslora.recipe.loading import load_recipe
from moslora.reports.page import render
from moslora.terminal import guarded_streams
from moslora.training.run_directory import RunDirectory
from moslora.wording import printable
from verbs import World

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

PACKAGE = Path(moslora.__file__).parent
# Sets a window's title, clears it, starts a C1 sequence, turns the order of reading around, and is rich's markup.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold]:smile:"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Ran:
    """What every verb did: exit code and output by what it does, connections, and the folder it wrote into."""

    done: dict[str, tuple[int, str]]
    connections: dict[str, list[Any]]
    out: Path


def refuse_connections(patch: pytest.MonkeyPatch, is_offline: bool) -> list[Any]:
    """Make every connection an error from here on, and return the list of those that were tried."""
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> Any:
        asked.append(where)
        raise OSError("a test has no network")

    for name in ("connect", "connect_ex", "sendto"):
        patch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection"):
        patch.setattr(socket, name, refuse)
    patch.setenv("HF_HUB_OFFLINE", str(int(is_offline)))
    patch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    patch.delenv("CI", raising=False)  # where it is set, TRL keeps to itself
    for module in (huggingface_hub.constants, datasets.config):
        patch.setattr(module, "HF_HUB_OFFLINE", is_offline)
    patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", False)
    return asked


def run(arguments: list[str]) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"})
    assert isinstance(done.exception, SystemExit | None), done.exception
    while _telemetry._TELEMETRY_QUEUE.unfinished_tasks:  # a thread of its own sends it
        time.sleep(0.01)
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    folder = tmp_path_factory.mktemp("world")
    world, out = World.make(folder, HOSTILE), folder / f"{HOSTILE}out"
    out.mkdir()
    found = Ran({}, {}, out)
    with pytest.MonkeyPatch.context() as patch:
        asked = refuse_connections(patch, is_offline=False)
        for what, arguments in world.commands(out).items():
            found.done[what] = run(arguments)
            found.connections[what] = asked.copy()
            asked.clear()
    yield found


def test_every_verb_takes_names_and_data_that_a_terminal_would_obey(ran: Ran) -> None:
    # The page listens until it is stopped, and is driven in tests/test_studio_browser.py.
    assert {what.partition(" ")[0].rstrip(",") for what in ran.done} == set(VERBS) - {"studio"}
    assert {what: text for what, (code, text) in ran.done.items() if code != 0} == {}


def test_no_verb_opens_a_connection(ran: Ran) -> None:
    assert {what: asked for what, asked in ran.connections.items() if asked} == {}


def test_no_verb_opens_a_connection_when_it_is_told_to_be_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World.make(tmp_path)
    asked = refuse_connections(monkeypatch, is_offline=True)
    for what, arguments in world.commands(tmp_path).items():
        if arguments[0] not in ("mix", "compare"):  # which train as train does
            assert (run(arguments)[0], asked) == (0, []), what


def test_no_verb_lets_control_characters_through(ran: Ran) -> None:
    shown = "".join(text for _, text in ran.done.values())
    assert r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202e[bold]:smile:" in shown  # and nothing else is made of it
    assert not OBEYED.findall(shown)
    pages = [*ran.out.rglob("*.html")]
    assert len(pages) == 4
    assert not any(OBEYED.findall(page.read_text(encoding="utf-8")) for page in pages)


def hostile_adapter(world: World, folder: Path, **changes: Any) -> Path:
    """An adapter whose modules, type and base have names that are hostile."""
    folder.mkdir()
    name = f"[/x]{HOSTILE}q_proj"
    tensors = load_file(world.native / "adapter_model.safetensors")
    renamed = {key.replace("q_proj", name): tensor for key, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((world.native / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"target_modules": [name, "down_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_names_of_modules_and_types_are_neither_markup_nor_obeyed(tmp_path: Path) -> None:
    world = World.make(tmp_path)
    odd = hostile_adapter(world, tmp_path / "odd", base_model_name_or_path=HOSTILE)
    wrong = hostile_adapter(world, tmp_path / "wrong", peft_type=HOSTILE)
    code, shown = run(["inspect", str(odd)])
    assert code == 0 and "[/x]" in shown and r"\x1b" in shown
    for adapter in map(str, (odd, wrong)):
        for arguments in (
            ["inspect", adapter],
            ["doctor", adapter, "--base", str(world.base), "--for", "peft,vllm"],
            ["export", adapter, str(tmp_path / "a")],
            ["export", adapter, str(tmp_path / "b"), "--debug"],
            ["merge", str(world.base), adapter, str(tmp_path / "c")],
            ["combine", adapter, adapter, "--out", str(tmp_path / "d")],
            ["evaluate", str(world.base), "--adapter", adapter, "--data", str(world.data)],
        ):
            assert not OBEYED.findall(run(arguments)[1]), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [HOSTILE],
        ["export", HOSTILE, "out"],
        ["export", HOSTILE, "out", "--debug"],
        ["export", "a", "b", HOSTILE],
        ["export", "a", "b", "--rank", HOSTILE],
        ["export", "a", "b", f"--{HOSTILE}"],
        ["export", "a", "b", "--to", HOSTILE],
        ["export", "\udcff", "out"],
        ["export", "a", "b", "\udcff"],
        ["doctor", "a", "--for", HOSTILE],
        ["train", HOSTILE],
        ["train", f"{HOSTILE}=1"],
        ["train", f"model={HOSTILE}", f"data={HOSTILE}.jsonl"],
        ["train", "model=a", "data=\udcff"],
        ["train", "--resume", HOSTILE],
        ["evaluate", HOSTILE, "--data", "a"],
        ["plan", f"model={HOSTILE}"],
        ["compare", f"model={HOSTILE}", "data=a", "--methods", HOSTILE],
    ],
)
def test_errors_are_plain_text(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = run(arguments)
    assert code == 2 and len(shown) > 20 and not OBEYED.findall(shown)
    shown.encode()


def test_every_error_of_ours_is_plain_text_in_a_traceback_of_pythons() -> None:
    for name in moslora.__all__:
        kind = getattr(moslora, name)
        if isinstance(kind, type) and issubclass(kind, moslora.MoSLoRAError):
            how = (HOSTILE, [HOSTILE, HOSTILE], HOSTILE) if kind is moslora.DataError else (HOSTILE,)
            assert not OBEYED.findall(str(kind(*how))) and r"\x1b" in str(kind(*how))


def test_every_way_of_a_display_shows_text_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, given = Text(), f"[/x]{HOSTILE}\r{HOSTILE}"
    text.append(given, "bold")
    table = Table(title=given)
    table.add_column(given)
    table.add_row(given)
    display = Display()
    display.say(given)
    display.warn(given)
    display.show(text)
    display.show(table)
    display.table(given, [given], [[given]])
    with display.progress(given, 1) as progress:
        progress.advance(1, given)
    shown = capsys.readouterr().out
    assert shown.count(r"\x1b]0;owned") > 12 and "[/x]" in shown and not OBEYED.findall(shown)
    assert not OBEYED.findall(_NotebookProgress(1, given).html())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Silence().warn(given)
    assert not OBEYED.findall(str(caught[0].message)) and caught[0].filename == __file__


def test_a_bar_on_a_terminal_moves_and_its_words_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display.console._force_terminal = True
    with display.progress(f"[/x]{HOSTILE}", 1) as progress:
        progress.advance(1, f"[/x]{HOSTILE}")
    shown = capsys.readouterr().out
    assert "\x1b[" in shown and "[/x]" in shown
    assert "\x1b]0" not in shown and "\x1b[2J" not in shown and "\u202e" not in shown and "\x9b" not in shown


def test_what_other_libraries_write_is_guarded_and_their_bars_still_move(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with guarded_streams(), guarded_streams():
        print(HOSTILE)
        print(f"\r{HOSTILE}", file=sys.stderr)
        sys.stderr.write("\n\x1b[A")
        assert not sys.stdout.isatty()
    shown = capsys.readouterr()
    assert shown.out == f"{printable(HOSTILE)}\n" and shown.err == f"\r{printable(HOSTILE)}\n\n\x1b[A"


def test_a_page_and_its_drawings_show_what_would_turn_their_text_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moslora.reports.page as page

    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.html.jinja").write_text("{{ a }} {{ a | safe }}", encoding="utf-8")
    monkeypatch.setattr(page, "__file__", str(tmp_path / "page.py"))
    assert render("a", a="<b>\u202e\x1b") == r"&lt;b&gt;\u202e\x1b <b>\u202e\x1b"


# --- Names of files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["a", "é", "😀"])
def test_names_as_long_as_a_file_system_takes_work_at_rest(letter: str, tmp_path: Path) -> None:
    def name(start: str, suffix: str = "") -> Path:
        return tmp_path / f"{start}{letter * ((254 - len(suffix)) // len(letter.encode()))}{suffix}"

    world = World.make(tmp_path / "world")
    native = world.native.rename(name("n"))
    for arguments in (
        ["export", str(native), str(name("e"))],
        ["export", str(native), str(name("g", ".gguf")), "--to", "gguf", "--base", str(world.base)],
        ["combine", str(native), str(name("e")), "--out", str(name("c"))],
        ["merge", str(world.base), str(native), str(name("m"))],
        ["inspect", str(native), "--html", str(name("i", ".html"))],
        ["doctor", str(name("e"))],
    ):
        code, shown = run(arguments)
        assert code == 0, shown
    found = load_recipe(
        [*world.recipe(name("r")), f"mix={{adapters: {json.dumps([str(native)])}, weights: [1]}}"]
    )
    assert found.mix is not None and found.mix.adapters == [str(native)]
    assert RunDirectory.create(name("r"), name("x").name).path == name("r") / name("x").name


def test_a_name_that_is_not_utf8_is_refused_with_the_way_out(tmp_path: Path) -> None:
    world = World.make(tmp_path / "world")
    odd = world.native.rename(tmp_path / os.fsdecode(b"\xffnative"))
    for arguments in (
        ["export", str(odd), "out"],
        ["export", str(world.lora), os.fsdecode(b"\xffout")],
        ["export", str(world.lora), os.fsdecode(b"\xffout.gguf"), "--to", "gguf", "--base", str(world.base)],
        ["train", *world.recipe(tmp_path / os.fsdecode(b"\xffruns"))],
        ["inspect", str(odd)],
    ):
        code, shown = run(arguments)
        assert code == 2 and "mv OLD NEW" in shown and "Traceback" not in shown
    assert not list(Path.cwd().glob("*out*"))


# --- One way ------------------------------------------------------------------------------------------------

# Functions that write to a terminal, and the files that may call them.
WAYS = {
    "print": {"terminal.py", "display.py"},
    "Console": set(),
    "echo": {"cli/__init__.py"},  # the version
    "secho": set(),
    "warnings.warn": {"terminal.py", "versions.py"},  # versions.py: numbers of versions
    "sys.stdout.write": set(),
    "sys.stderr.write": set(),
    # Scripts that a process of their own runs, whose output comes back in an error of ours.
    "traceback.print_exc": {f"training/reload_proof/stock_{name}.py" for name in ("peft", "diffusers")},
    "TextColumn": {"display.py"},
}


def test_nothing_is_shown_by_another_way() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                for way, allowed in WAYS.items():
                    place = path.relative_to(PACKAGE).as_posix()
                    if (called == way or called.endswith(f".{way}")) and place not in allowed:
                        found.add(
                            f"{place}:{node.lineno} calls {called}; take moslora.display or moslora.terminal"
                        )
    assert not found


# --- Telemetry ----------------------------------------------------------------------------------------------


def constants() -> list[Any]:
    return [getattr(sys.modules[m], name, None) for m, name, _ in CONSTANTS if m in sys.modules]


def test_outside_a_call_the_users_settings_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    before, values, other = dict(os.environ), constants(), no_telemetry()
    with pytest.raises(KeyError), no_telemetry():
        thread = threading.Thread(target=other.__enter__)  # another call begins, and is under way still
        thread.start()
        thread.join()
        raise KeyError
    assert ENVIRONMENT.items() <= os.environ.items()
    other.__exit__(None, None, None)
    assert dict(os.environ) == before and constants() == values


@pytest.mark.parametrize("said", ["0", "1"])
def test_processes_that_are_started_report_nothing_and_what_is_imported_meanwhile_is_put_right(
    said: str,
) -> None:
    code = (
        "import os, subprocess, sys\n"
        "from moslora.compat.telemetry import no_telemetry\n"
        "with no_telemetry():\n"
        "    import huggingface_hub.constants as c\n"
        "    assert c.HF_HUB_DISABLE_TELEMETRY and os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'\n"
        "print(c.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": said, "DO_NOT_TRACK": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(said == "1")]


def test_every_verb_of_the_command_and_of_the_python_api_reports_nothing() -> None:
    assert set(VERBS) <= set(DOING)
    functions = [
        name for name in moslora.__all__ if getattr(moslora, name).__module__.startswith("moslora.api.")
    ]
    verbs = [name for name in functions if not isinstance(getattr(moslora, name), type)]
    assert len(verbs) >= 15 and {name.removesuffix("_adapter") for name in verbs} == set(DOING) - {"studio"}
    for name in verbs:
        cells = [cell.cell_contents for cell in getattr(moslora, name).__closure__ or ()]
        assert any(getattr(cell, "func", None) is verb.__wrapped__ for cell in cells), name
