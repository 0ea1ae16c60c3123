"""Killed at any change of a file system and called again, a verb leaves what it leaves undisturbed. See ``kill.py``."""

from __future__ import annotations

import contextlib
import inspect
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kill
import warm
from moslora import files
from moslora.adapters import export as exporting
from moslora.adapters import merge as merging
from moslora.adapters.export import export_adapter
from moslora.adapters.formats.table import FORMATS, WRITTEN
from moslora.adapters.merge import merge
from moslora.comparison import cell_files, compare
from moslora.display import Display
from moslora.errors import BusyError, ExistsError, UsageError
from moslora.files import process_start
from moslora.models import gguf
from moslora.models.names import ModelSource
from moslora.tasks.image import prior
from moslora.training.reload_proof import stock_diffusers, stock_peft
from moslora.training.run import resume
from moslora.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills and forks are POSIX"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, proofs_start_warm: warm.Warm) -> Generator[kill.Trial]:
    kill.import_all()
    proofs_start_warm.start()
    yield kill.Trial(tmp_path_factory.mktemp("killed"))


def at(changes: kill.Changes, event: str, place: str) -> int:
    """Return the number of a change."""
    return next(n for n, (e, p) in enumerate(changes, 1) if e == event and p == place)


# --- Killed and called again


@pytest.mark.parametrize("name", ["export", "export to gguf", "import", "merge", "inspect"])
def test_a_verb_killed_at_a_change_and_called_again_leaves_what_it_leaves_undisturbed(
    trial: kill.Trial, name: str
) -> None:
    tally = trial.run(kill.VERBS[name], every=4, first=2)
    assert tally.points and not tally.faults, "\n".join(tally.faults)


def test_a_run_killed_between_two_writes_goes_on_to_the_same_end(trial: kill.Trial) -> None:
    verb = kill.VERBS["train"]
    ended, wanted = trial.undisturbed(verb)
    places = [path for event, path in ended.changes if event == "os.rename"]
    assert places[-2:] == ["runs/one/report.html", "runs/one/run.json"], "a completed run has its report"
    measured = at(ended.changes, "os.rename", "runs/one/evaluation-after.json")
    assert not trial.kill(verb, measured + 1, False, wanted)


@pytest.mark.trial
@pytest.mark.parametrize("name", kill.VERBS)
def test_a_verb_killed_at_any_change_leaves_what_it_leaves_undisturbed(trial: kill.Trial, name: str) -> None:
    tally = trial.run(kill.VERBS[name])
    print(f"{name}: {tally.changes} changes, {tally.points} kills, {len(tally.faults)} faults")
    assert not tally.faults, "\n".join(tally.faults)


def test_a_run_whose_recipe_was_not_written_says_so(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    with pytest.raises(UsageError, match=r"stopped before its recipe was written.*Remove it"):
        resume(run.path, Display(quiet=True))


def test_a_run_directory_is_never_there_without_record_and_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = Path.rename

    def spy(self: Path, target: Path) -> Path:
        seen.append(sorted(path.name for path in self.iterdir()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", spy)
    run = RunDirectory.create(tmp_path, "demo", "seed: 1\n", seed=1)
    assert seen == [["recipe.yaml", "run.json"]] and [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert (run.read()["seed"], run.read()["name"], run.recipe.read_text()) == (1, "demo", "seed: 1\n")


def test_claiming_a_run_sweeps_up_directories_too(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    for name in (".adapter.123-0123abcd.part", ".lora.0123abcd-123-0123abcd.part", ".start.x1y2z3"):
        (run.path / name).mkdir()
        (run.path / name / "half").touch()
    (run.path / "pictures").mkdir()
    (run.path / "pictures" / ".a.png.123-0123abcd.part").touch()
    run.claim()
    assert sorted(path.name for path in run.path.rglob("*")) == ["pictures", "run.json"]


# --- Leftovers


def gone() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_is_removed_by_the_next_and_a_living_ones_is_named(tmp_path: Path) -> None:
    here, dead, alive = (
        files._machine(),
        gone(),
        subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1),
    )
    try:
        (tmp_path / f".out.{here}-{dead}-00000001.part").mkdir()
        (tmp_path / f".out.{here}-{dead}-00000001.part" / "half").touch()
        (tmp_path / f".old.txt.{here}-{dead}-00000002.part").touch()
        kept = tmp_path / f".out.0a0b0c0d-{dead}-00000003.part"  # of another machine, where it may live
        kept.mkdir()
        with files.new_directory(tmp_path / "out") as made:
            assert {path.name for path in tmp_path.glob(".out.*")} == {made.name, kept.name}
        files.write_text(tmp_path / "old.txt", "new")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kept.name, "old.txt", "out"])
        theirs = tmp_path / f".new.{here}-{alive.pid}-00000004.part"
        theirs.mkdir()
        for write in (files.new_directory, files.new_file):
            with pytest.raises(BusyError, match=f"Process {alive.pid} is writing"), write(tmp_path / "new"):
                pass
        assert theirs.exists() and not (tmp_path / "new").exists()
    finally:
        alive.kill()
        alive.communicate()


def test_a_long_name_leaves_room_for_more_and_stays_its_own(tmp_path: Path) -> None:
    one, other = ("ä" * 100 + end for end in ("one", "other"))
    with files.new_directory(tmp_path / one), files.new_directory(tmp_path / other):
        files.write_text(tmp_path / ("x" * 255), "")
    assert {path.name for path in tmp_path.iterdir()} == {one, other, "x" * 255}


def test_temporary_folders_of_proofs_are_removed_by_the_next_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"moslora-proof.{files._machine()}-{gone()}-00000001.part"
    left.mkdir()
    with files.scratch("moslora-proof") as folder:
        assert list(tmp_path.iterdir()) == [folder] and folder.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [stock_peft, stock_diffusers])
def test_the_process_of_a_proof_ends_when_its_parent_is_killed(script: Any) -> None:
    watched = f"import os, threading, time\n{inspect.getsource(script.end_with_asker)}\nend_with_asker()\n"
    watched += "print(os.getpid(), flush=True); time.sleep(60)"
    asks = (
        "import subprocess, sys; from moslora.files import lifeline\n"
        "with lifeline() as alive: subprocess.run([sys.executable, '-S', '-c', sys.argv[1]], stdin=alive)"
    )
    parent = subprocess.Popen([sys.executable, "-c", asks, watched], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()  # until nobody holds the pipe any more
    end = time.monotonic() + 10
    while process_start(child) is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert process_start(child) is None


@pytest.mark.trial
def test_a_worker_of_a_comparison_ends_when_its_parent_is_killed() -> None:
    begins = (
        "import multiprocessing\nfrom moslora.comparison.local import _end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    worker = multiprocessing.get_context('spawn').Process(target=_end_with_parent)\n"
        "    worker.start(); print(worker.pid, flush=True); worker.join()"
    )
    parent = subprocess.Popen([sys.executable, "-c", begins], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    assert process_start(worker) is not None
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 60
    while process_start(worker) is not None and time.monotonic() < end:
        time.sleep(0.05)
    assert process_start(worker) is None


# --- Two at once


def test_of_two_that_write_one_place_the_first_wins_and_the_other_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with files.new_directory(out), pytest.raises(BusyError), files.new_directory(out):
        pass
    monkeypatch.setattr(files, "clear_leftovers", lambda *_: [])  # both looked before either began
    for write in (files.new_directory, files.new_file):
        out = tmp_path / write.__name__
        with pytest.raises(ExistsError, match="another process wrote it meanwhile"), write(out) as one:
            with write(out) as other:
                (other / "a" if other.is_dir() else other).write_text("first")
            (one / "a" if one.is_dir() else one).write_text("second")
        assert (out / "a" if out.is_dir() else out).read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new_directory", "new_file", "out"]


def test_a_file_system_without_hard_links_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    with files.new_file(tmp_path / "out") as place:
        place.write_text("mine")
    assert (tmp_path / "out").read_text() == "mine"
    with pytest.raises(ExistsError), files.new_file(tmp_path / "other") as place:
        place.write_text("mine")
        (tmp_path / "other").write_text("theirs")
    assert (tmp_path / "other").read_text() == "theirs"


@pytest.mark.parametrize("format_", [*WRITTEN, "merge"])
def test_an_export_that_is_overtaken_says_so_and_leaves_the_other_alone(
    trial: kill.Trial, tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"diffusers": "drawing", "kohya": "drawing", "original": "painting/transformer"}
    source = trial.origin / sources.get(format_, "native")
    module: Any = merging if format_ == "merge" else exporting
    suffix = "" if format_ == "merge" else FORMATS[format_].suffix
    out, prove = tmp_path / f"out{suffix}", module._prove

    def overtaken(*given: Any) -> Any:
        if suffix:
            out.write_text("theirs")
        else:
            out.mkdir()
            (out / "theirs").touch()
        return prove(*given)

    monkeypatch.setattr(module, "_prove", overtaken)
    base = str(trial.origin / "base")
    with pytest.raises(ExistsError, match="meanwhile"):
        if format_ == "merge":
            merge(base, source, out, lambda _: None)
        else:
            export_adapter(source, out, format_, base=base if FORMATS[format_].needs_base else None)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "theirs" if suffix else [p.name for p in out.iterdir()] == ["theirs"]


def test_a_model_in_the_cache_that_another_process_just_made_is_not_taken_for_damaged(
    trial: kill.Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    source = ModelSource("model", "gguf", str(tmp_path), file)
    answers, said = iter([False, True]), []
    monkeypatch.setattr(gguf, "_is_whole", lambda folder: next(answers))
    found = gguf.materialize(source, cache=tmp_path, say=said.append)
    assert found.kind == "folder" and not said


# --- Comparisons


def claim(folder: Path) -> contextlib.AbstractContextManager[None]:
    plan: Any = SimpleNamespace(directory=folder, cells=[], methods=[])
    task: Any = None
    return compare._claimed(plan, task, Display(quiet=True), "")


def test_a_comparison_killed_before_its_record_begins_and_a_second_at_once_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "_identity", lambda plan, task: {})
    folder = tmp_path / "c"
    (folder / "cells").mkdir(parents=True)
    (folder / ".compare.json.0123abcd-1-0123abcd.part").touch()
    with claim(folder):
        assert {path.name for path in folder.iterdir()} == {"cells", "compare.json"}
        with pytest.raises(BusyError, match="Another process is working in"), claim(folder):
            pass
    other = tmp_path / "other"
    other.mkdir()
    # The first has made the folder, and is about to write its record.
    with files.locked(other), pytest.raises(BusyError), claim(other):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UsageError, match="not a comparison"), claim(tmp_path / "mine"):
        pass


def test_the_mark_of_a_cell_that_is_finished_is_taken_away(tmp_path: Path) -> None:
    cell: Any = ("method", 1.0, 0)
    plan: Any = SimpleNamespace(
        cells=[cell], mark=lambda _: tmp_path / "a.started", cell_file=lambda *_: tmp_path / "a.json"
    )
    (tmp_path / "a.started").write_text("1")
    (tmp_path / "a.json").write_text("{}")
    cell_files.mark_crashed_cells(plan, Display(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- Pictures


def test_a_generated_picture_never_counts_as_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []

    def killed(path: Path) -> Any:
        recorded.append((path.parent / prior.GENERATED).exists())
        raise KeyboardInterrupt

    monkeypatch.setattr(prior, "replaced_file", killed)
    pictures = prior.ClassPictures.__new__(prior.ClassPictures)
    pictures.__dict__.update(folder=tmp_path, prompt="a thing", base="base", missing=[0], pictures=None)
    with pytest.raises(KeyboardInterrupt):
        pictures.generate(lambda prompt, seed: b"png", 0)
    assert recorded == [True]
