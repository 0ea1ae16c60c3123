"""``--continue``: one command starts a run, goes on with it, and leaves it alone once it is completed."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import moslora.training.continuing
import moslora.training.run
import tiny
from moslora.cli import app
from moslora.display import Display
from moslora.errors import BusyError, UsageError
from moslora.recipe.loading import load_recipe
from moslora.training import run_directory
from moslora.training.continuing import start_or_continue
from moslora.training.handed_over import HandedOver
from moslora.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    return folder


def arguments(world: Path, out: Path, *more: str) -> list[str]:
    given = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "task.generate_examples": 0,
        "evaluation.also": "[]",
        "trainer.max_steps": 2,
        "output": out / "run",
    }
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def begin(world: Path, out: Path, *more: str, **kwargs: Any) -> RunDirectory:
    return start_or_continue(load_recipe(arguments(world, out, *more)), Display(quiet=True), **kwargs)


def test_one_command_starts_a_run_goes_on_with_it_and_then_leaves_it_alone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = moslora.training.run.fit, []

    def fit(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise OSError("a disk that is away")
        return honest(*given)

    monkeypatch.setattr(moslora.training.run, "fit", fit)
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    with pytest.raises(OSError, match="a disk that is away"):
        begin(world, tmp_path)
    run = RunDirectory.open(tmp_path / "run")
    assert run.read()["status"] == "failed"
    begin(world, tmp_path)
    assert run.read()["status"] == "completed" and len(calls) == 2
    record = run.record.read_bytes()
    begin(world, tmp_path)
    ran = CliRunner().invoke(app, ["train", *arguments(world, tmp_path), "--continue", "--json"])
    assert ran.exit_code == 0 and '"status": "completed"' in ran.output
    assert run.record.read_bytes() == record and len(calls) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_of_other_settings_is_not_taken_for_this_one(world: Path, tmp_path: Path) -> None:
    text = load_recipe(arguments(world, tmp_path, "adapter.r=4")).to_yaml()
    RunDirectory.create(tmp_path, "run", text)
    with pytest.raises(UsageError, match=r"another recipe: adapter\.r, trainer\.max_steps differ"):
        begin(world, tmp_path, "trainer.max_steps=3")
    with pytest.raises(UsageError, match="another recipe: parallel differs"):
        begin(world, tmp_path, "adapter.r=4", "parallel.kind=fsdp")


def test_a_run_that_another_process_holds_is_waited_for_and_not_run_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = load_recipe(arguments(world, tmp_path)).to_yaml()
    run = RunDirectory.create(tmp_path, "run", text)
    run.update(host="another-" + socket.gethostname(), pid=1)
    monkeypatch.setattr(run_directory, "LOOKS", 0.01)
    monkeypatch.setattr(moslora.training.continuing, "WAIT", 0.1)
    with pytest.raises(BusyError, match="still in progress: process 1 on another-"):
        begin(world, tmp_path)
    assert run.read()["host"].startswith("another-")
    # Once that host gives no sign of life any more, the run is this process's.
    ago = time.time() - 2 * run_directory.HEARTBEAT_SECONDS
    timer = threading.Timer(0.1, os.utime, (run.record, (ago, ago)))
    timer.start()
    run.claim(wait=30)
    timer.join()
    assert run.is_held()


def test_two_that_begin_at_once_begin_one_run(world: Path, tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, "run", "", only_as_named=True)
    with pytest.raises(BusyError, match="was begun by another process just now"):
        RunDirectory.create(tmp_path, "run", "", only_as_named=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_told_apart_from_another_run_is_refused(world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no run\.json"):
        begin(world, tmp_path)
    with pytest.raises(UsageError, match="objects that a script hands over"):
        begin(world, tmp_path, handed_over=HandedOver(rows={"train": [{"text": "x"}]}))
