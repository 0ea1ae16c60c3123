from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moslora.cli import app

VERBS = [(command.name or command.callback.__name__) for command in app.registered_commands]


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})
    return result.exit_code, re.sub(r"\x1b\[[0-9;]*m", "", result.output)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verbs_help_has_an_example(verb: str) -> None:
    code, shown = invoke(verb, "--help")
    assert code == 0 and f"moslora {verb}" in shown and "[bold]" not in shown


def test_help_names_every_verb_and_the_exit_codes() -> None:
    code, shown = invoke("--help")
    assert code == 0 and all(verb in shown for verb in VERBS) and "Exit codes" in shown


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    script = (
        "import sys; sys.argv = ['moslora', '--help']\n"
        "from moslora.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'trl', 'datasets', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Nothing to train"),
        (["train", "no-such.yaml"], "no-such.yaml"),
        (["train", "adapter.r=4"], "model"),
        (["train", "--resume", "runs/none"], "is not a run"),
        (["train", "x=1", "--resume", "runs/none"], "takes nothing beside it"),
        (["export", "no-such", "out"], "does not exist"),
        (["export", ".", "out", "--to", "lor"], "Did you mean 'lora'"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown = invoke(*arguments)
    assert code == 2 and message in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_version_is_the_packages() -> None:
    code, shown = invoke("--version")
    assert code == 0 and re.fullmatch(r"moslora \d+\.\d+\.\d+\s*", shown)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_export_leaves_nothing_and_says_so_by_its_exit_code(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    program = (
        "import os, signal, sys, moslora.cli, moslora.adapters.export\n"
        "from pathlib import Path\n"
        # A job in the background of a shell ignores SIGINT, and so do those it starts, the tests among them.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from moslora.files import new_directory\n"
        "def work(source, out, *_, **__):\n"
        "    with new_directory(Path(out)) as place:\n"
        "        (place / 'half').write_text('half')\n"
        "        os.kill(os.getpid(), int(sys.argv.pop()))\n"
        "        while True: pass\n"
        "moslora.adapters.export.export_adapter = work\n"
        "number = sys.argv[-1]\n"
        "sys.argv[1:-1] = ['export', 'adapter', sys.argv[1]]\n"
        "app = moslora.cli.app\n"
        "arguments = sys.argv[1:-1]\n"
        "app(args=arguments)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out"), str(int(sent))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == code, result.stderr
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in result.stderr
