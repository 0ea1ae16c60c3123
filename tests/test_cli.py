from __future__ import annotations

import ast
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moslora.cli
from moslora.api.calling import command_or
from moslora.cli import app
from moslora.display import Display

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
        (["train", "x=1", "--resume", "runs/none"], "cannot be combined"),
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


# Beside the API: how text is shown, and errors are told.
SHOWING = ("moslora.display", "moslora.terminal", "moslora.wording", "moslora.errors", "moslora.failures")
ALLOWED = ("moslora.api.", "moslora.cli", "moslora.distributed", *SHOWING)


def test_the_command_calls_the_python_api_and_nothing_below_it() -> None:
    for path in Path(moslora.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moslora"):
                # Which word is the recipe's path, and which a setting, is the recipe's to say.
                wanted = (*ALLOWED, "moslora.recipe.loading") if path.name == "parsing.py" else ALLOWED
                assert (node.module or "").startswith(wanted), f"{path.name} imports {node.module}"


class CalledError(BaseException):
    """Raised in place of a verb, with what it was given; it passes what turns errors into messages."""


# What is typed → the function of the Python API, and what it is given (``progress`` aside).
FORWARDED: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "train r.yaml seed=3": ("training.train", ("r.yaml",), {"settings": ["seed=3"], "continue_run": False}),
    "train model=m data=d": (
        "training.train",
        (None,),
        {"settings": ["model=m", "data=d"], "continue_run": False},
    ),
    "train r.yaml --continue": ("training.train", ("r.yaml",), {"settings": [], "continue_run": True}),
    "train r.yaml --dry-run": ("training.check", ("r.yaml",), {"settings": []}),
    "train --resume runs/a": ("training.resume", (Path("runs/a"),), {"settings": []}),
    "train --resume runs/a trainer.max_steps=9": (
        "training.resume",
        (Path("runs/a"),),
        {"settings": ["trainer.max_steps=9"]},
    ),
    "mix a b seed=3 --recipe r.yaml --weights 1,0.5": (
        "training.mix",
        (["a", "b"], "r.yaml", [1.0, 0.5]),
        {"settings": ["seed=3"]},
    ),
    "mix a b --recipe r.yaml --weights mean": (
        "training.mix",
        (["a", "b"], "r.yaml", "mean"),
        {"settings": []},
    ),
    "mix a b --recipe r.yaml": ("training.mix", (["a", "b"], "r.yaml", None), {"settings": []}),
    "plan r.yaml seed=3 --length 9 --quantize nf4": (
        "planning.plan",
        ("r.yaml",),
        {"settings": ["seed=3"], "length": 9, "scored": None, "quantize": "nf4"},
    ),
    "advise r.yaml seed=3": ("advising.advise", ("r.yaml",), {"settings": ["seed=3"]}),
    "chat a --base m --adapter b --adapter c --seed 3 --temperature 0.5 --system x": (
        "chatting.chat",
        ([Path("a"), Path("b"), Path("c")], "m"),
        {"system": "x", "seed": 3, "temperature": 0.5, "max_new_tokens": None},
    ),
    "push a o/n --private --revision b --base x/y --dry-run": (
        "adapters.push",
        (Path("a"), "o/n"),
        {"private": True, "revision": "b", "base": "x/y", "dry_run": True},
    ),
    "compare r.yaml seed=3 --methods lora,dora --learning-rates 1e-3,1e-2, --steps 5 --together 2 --width 0.02 "
    "--confirm 40 --off-rates 0.3,3 --contrast a:b --contrast c:d": (
        "judging.compare",
        ("r.yaml",),
        {
            "settings": ["seed=3"],
            "methods": ["lora", "dora"],
            "learning_rates": [1e-3, 1e-2],
            "steps": 5,
            "together": 2,
            "seeds": 3,
            "validation": 64,
            "engine": "local",
            "width": 0.02,
            "confirm": 40,
            "off_rates": [0.3, 3.0],
            "contrasts": ["a:b", "c:d"],
            **dict.fromkeys(("baseline", "examples", "benchmark", "benchmark_as", "out", "workers")),
            **dict.fromkeys(("rates_from", "off_seeds")),
        },
    ),
    "evaluate m seed=3 --adapter a --data d --limit 2 --predictions p": (
        "judging.evaluate",
        ("m",),
        {
            "settings": ["seed=3"],
            "adapter": Path("a"),
            "data": "d",
            "limit": 2,
            "predictions": Path("p"),
            "recipe": None,
            "tasks": [],
            "lm_eval": [],
            "benchmark": [],
            "exchange": True,
            **dict.fromkeys(("protocol", "benchmark_as", "prompt", "out")),
        },
    ),
    "evaluate m --benchmark a.tsv b.tsv data.square=pad --no-exchange --out o": (
        "judging.evaluate",
        ("m",),
        {
            "settings": ["data.square=pad"],
            "benchmark": ["a.tsv", "b.tsv"],
            "exchange": False,
            "out": Path("o"),
            "tasks": [],
            "lm_eval": [],
            **dict.fromkeys(("adapter", "data", "limit", "predictions", "recipe")),
            **dict.fromkeys(("protocol", "benchmark_as", "prompt")),
        },
    ),
    "combine a b --out o --weights 1,2": (
        "adapters.combine",
        ([Path("a"), Path("b")], Path("o"), [1.0, 2.0], "lora"),
        {"rank": None, "dtype": None, "base": None},
    ),
    "doctor a --for vllm,peft": ("adapters.doctor", (Path("a"), None, ["vllm", "peft"]), {}),
    "inspect a --html p": ("adapters.inspect", (Path("a"), None), {"html": Path("p")}),
    "studio w --recipe r.yaml --allow a --allow b --host 0.0.0.0 --port 0 --max-upload 9 --open": (
        "serving.serve",
        (Path("w"),),
        {
            "recipe": "r.yaml",
            "allow": [Path("a"), Path("b")],
            "host": "0.0.0.0",
            "port": 0,
            "max_upload": 9,
            "browser": True,
        },
    ),
    "merge m a o": ("adapters.merge", ("m", Path("a"), Path("o")), {}),
    "import a o --alpha 2": ("adapters.import_adapter", (Path("a"), Path("o")), {"base": None, "alpha": 2.0}),
    "export a o --for vllm --rank 2": (
        "adapters.export",
        (Path("a"), Path("o"), None),
        {"engine": "vllm", "rank": 2, "dtype": None, "base": None, "alpha": None, "names": None},
    ),
}


@pytest.mark.parametrize("typed", FORWARDED)
def test_what_is_typed_reaches_the_python_api(typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, arguments, options = FORWARDED[typed]
    module, _, name = place.partition(".")

    def function(*given: Any, **named: Any) -> None:
        raise CalledError(given, named, command_or(""))

    monkeypatch.setattr(f"moslora.api.{module}.{name}", function)
    monkeypatch.setattr("sys.argv", ["/bin/moslora", *typed.split()])
    with pytest.raises(CalledError) as called:
        CliRunner().invoke(app, [*typed.split(), "--debug"], catch_exceptions=False)
    given, named, command = called.value.args
    progress = [value for value in (*given, named.pop("progress", None)) if isinstance(value, Display)]
    assert tuple(value for value in given if not isinstance(value, Display)) == arguments
    assert named == options and len(progress) <= 1
    assert command == f"moslora {typed}", "the record of a run names the command that was typed"


def test_numbers_that_are_none_are_refused_with_an_example() -> None:
    for typed, message in (
        ("combine a b --out o --weights 1,,2", "--weights 1,,2 is not a list of numbers, such as 1,0.5"),
        ("compare r.yaml --learning-rates fast", "--learning-rates fast is not a list of numbers"),
        ("mix a b --recipe r --weights all", "neither a list of numbers, such as 1,0.5, nor mean"),
    ):
        code, shown = invoke(*typed.split())
        assert code == 2 and message in " ".join(shown.split())


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
