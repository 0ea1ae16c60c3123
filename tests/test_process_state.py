"""What belongs to the whole process, or to several: signals, logging, limits, memory, signs of life."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import moslora
from moslora.comparison import cell_files
from moslora.data.files import read_records
from moslora.display import Display
from moslora.errors import Stopped
from moslora.models import loading
from moslora.models.loading import call_loader, quantization_options, quiet_transformers
from moslora.models.names import ModelSource
from moslora.recipe.loading import load_recipe
from moslora.recipe.trainer_arguments import resolve_trainer_arguments
from moslora.training.fallbacks import fallbacks_shown
from moslora.training.heartbeat import heartbeat
from moslora.training.run_directory import RunDirectory
from moslora.training.stop import StopRequest


def test_a_signal_handler_writes_nothing_and_the_request_is_told_where_the_run_looks() -> None:
    said = io.StringIO()
    with StopRequest(Display(said)) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        while stop.received is None:
            time.sleep(0.001)
        assert said.getvalue() == ""
        assert stop.agreed() == signal.SIGTERM
        with pytest.raises(Stopped):
            stop.check()
    assert said.getvalue().count("Stopping at the next safe place") == 1


def test_a_run_gives_signs_of_life_while_it_works_and_none_afterwards(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, "demo")
    record = run.record
    before = record.read_text()
    os.utime(record, (1, 1))
    with heartbeat(run, 0.01):
        end = time.monotonic() + 5
        while record.stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.01)
    assert record.stat().st_mtime > 1 and record.read_text() == before
    os.utime(record, (1, 1))
    time.sleep(0.05)
    assert record.stat().st_mtime == 1


def test_who_lost_a_run_to_another_process_ends_and_gives_no_more_signs(tmp_path: Path) -> None:
    run, lost = RunDirectory.create(tmp_path, "demo"), threading.Event()
    assert run.is_held()
    with heartbeat(run, 0.01, lambda _: lost.set()):
        run.update(host="another-host")
        assert lost.wait(5)
        os.utime(run.record, (1, 1))
        time.sleep(0.05)
    assert not run.is_held() and run.record.stat().st_mtime == 1
    # What ends it is a hard end, with a word on who has the run now.
    script = (
        "import sys, time; from pathlib import Path; from moslora.training.heartbeat import heartbeat\n"
        "from moslora.training.run_directory import RunDirectory\n"
        "with heartbeat(RunDirectory.open(Path(sys.argv[1])), 0.01): time.sleep(30)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(run.path)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1 and "was taken over by process" in ended.stderr


def test_fallbacks_are_shown_while_a_run_lasts() -> None:
    from moslora.core.notices import tell_once

    logger, said = logging.getLogger("moslora.core.ops"), io.StringIO()
    root = logging.getLogger("moslora")
    before = (root.level, list(root.handlers))
    for _ in range(2):  # each run says it again
        with fallbacks_shown(Display(said)):
            for _ in range(3):
                tell_once(logger, "The slow path runs: %s.", "a reason of this test")
    assert said.getvalue().count("The slow path runs: a reason of this test.") == 2
    assert (root.level, list(root.handlers)) == before


def test_transformers_speaks_again_after_the_last_of_several_quiet_blocks() -> None:
    from transformers.utils import logging as upstream

    before = upstream.get_verbosity()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quiet_transformers():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=other)
    with quiet_transformers():
        thread.start()
        entered.wait(5)
    assert upstream.get_verbosity() == upstream.ERROR  # the other block is still open
    leave.set()
    thread.join()
    assert upstream.get_verbosity() == before


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError("CUDA out of memory"), MemoryError("no room")])
def test_a_model_for_which_memory_is_short_is_not_called_damaged(error: Exception) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        call_loader(ModelSource("m", "folder", "m"), load, {})


def test_bfloat16_is_chosen_only_where_the_gpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def emulates(including_emulation: bool = True) -> bool:
        return including_emulation

    import peft  # noqa: F401  - its import asks for packages, too

    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", emulates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: find(name) or object())
    recipe = load_recipe(["model=org/x", "data=a.jsonl"])
    assert resolve_trainer_arguments(recipe, "cuda")["bf16"] is False
    options = quantization_options("nf4", "auto", "cuda")
    assert options is not None and options["bnb_4bit_compute_dtype"] == "float16"
    assert loading.default_device() == "cuda"


def test_long_fields_of_a_csv_leave_the_limit_of_the_process_alone(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{long},a\nb,c\n")
    seen = []
    rows = [
        row for row in read_records(str(tmp_path / "a.csv")).rows if not seen.append(csv.field_size_limit())
    ]
    assert len(rows) == 2 and set(seen) == {before} and csv.field_size_limit() == before


def test_two_threads_that_look_for_peft_both_find_it_with_the_registration() -> None:
    finder = moslora._AfterPeft()
    asked = []

    class Slow:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "peft" and threading.current_thread() is not threading.main_thread():
                asked.append(finder.find_spec("peft", None) is None)  # this thread is asking already
                inside.set()
                leave.wait(5)

    inside, leave = threading.Event(), threading.Event()
    loaded, slow = sys.modules.pop("peft", None), Slow()
    sys.meta_path.insert(0, slow)  # type: ignore[arg-type]
    try:
        thread = threading.Thread(target=lambda: finder.find_spec("peft", None))
        thread.start()
        inside.wait(5)
        spec = finder.find_spec("peft", None)
        leave.set()
        thread.join()
    finally:
        if loaded is not None:
            sys.modules["peft"] = loaded
        sys.meta_path.remove(slow)  # type: ignore[arg-type]
    assert asked == [True] and spec is not None
    assert spec.loader is not None and "execute_and_register" in str(vars(spec.loader))


def test_a_finished_cell_is_read_once_however_often_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plan:
        cells = ((0,), (1,), (2,))

        def cell_file(self, number: int) -> Path:
            return tmp_path / f"{number}.json"

    for number in range(3):
        cell = {"method": "lora", "learning_rate": 0.1, "seed": number, "status": "done"}
        (tmp_path / f"{number}.json").write_text(json.dumps(cell))
    parsed = []
    loads = json.loads
    monkeypatch.setattr(cell_files.json, "loads", lambda text: parsed.append(text) or loads(text))
    for _ in range(5):
        assert [cell.seed for cell in cell_files.read_cells(Plan())] == [0, 1, 2]  # type: ignore[arg-type]
    assert len(parsed) == 3
    (tmp_path / "1.json").write_text(
        json.dumps({"method": "dora", "learning_rate": 0.1, "seed": 9, "status": "done"})
    )
    assert [cell.seed for cell in cell_files.read_cells(Plan())] == [0, 9, 2]  # type: ignore[arg-type]
