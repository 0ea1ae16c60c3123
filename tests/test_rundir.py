"""The laws of a run directory: nothing overwritten, nothing half-written, no step twice."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moslora import files
from moslora.training import run_directory as rundir
from moslora.training.metrics_log import MetricsLog, read_metrics
from moslora.training.provenance import collect_hardware, collect_versions
from moslora.training.run_directory import RunDirectory, is_alive


def write_record(run: RunDirectory, **fields: Any) -> None:
    """Change run.json behind the run's back, as a run of another process would have left it."""
    run.record.write_text(json.dumps({**run.read(), **fields}))


def make_checkpoint(run: RunDirectory, step: int, omit: str = "") -> Path:
    """Leave what transformers 5.23 leaves at ``step``, in miniature."""
    path = run.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(4, 4)}, path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": step}, path / name)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if omit:
        (path / omit).unlink()
    return path


# --- the directory


def test_a_run_never_takes_a_directory_that_is_there(tmp_path):
    names = [RunDirectory.create(tmp_path / "runs", "demo").path.name for _ in range(3)]
    assert names == ["demo", "demo-2", "demo-3"]
    (tmp_path / "runs" / "file").write_text("kept")
    assert RunDirectory.create(tmp_path / "runs", "file").path.name == "file-2"
    assert (tmp_path / "runs" / "file").read_text() == "kept"


def test_processes_that_start_at_once_get_different_directories(tmp_path):
    code = (
        "import sys; from pathlib import Path; from moslora.training.run_directory import RunDirectory\n"
        "sys.stdin.readline(); print(RunDirectory.create(Path(sys.argv[1]), 'demo').path.name)"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in starts:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    names = sorted(process.communicate()[0].strip() for process in starts)
    assert names == ["demo", "demo-2", "demo-3"]


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../x", "a/b", "/abs", "a\\b", "-f", "--help", ".hidden", "a\n"]
)
def test_a_name_that_is_no_plain_folder_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="Run name"):
        RunDirectory.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_opening_what_is_no_run_names_the_nearest_one(tmp_path):
    RunDirectory.create(tmp_path, "smart-home")
    with pytest.raises(FileNotFoundError, match=r"does not exist.*Did you mean .*smart-home"):
        RunDirectory.open(tmp_path / "smart-hoem")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no run.json.*Runs in .*: smart-home"):
        RunDirectory.open(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="There are no runs"):
        RunDirectory.open(tmp_path / "nowhere" / "x")


@pytest.mark.parametrize("content", ["", '{"status": "runn', "[1]", "\0\0\0"])
def test_a_damaged_record_is_refused_by_name(tmp_path, content):
    run = RunDirectory.create(tmp_path, "demo")
    run.record.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        RunDirectory.open(run.path)


def test_a_record_of_a_newer_version_is_refused(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    write_record(run, schema_version=99)
    with pytest.raises(ValueError, match="schema_version 99"):
        RunDirectory.open(run.path)


# --- run.json


def test_updates_merge_at_every_depth(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    run.update(metrics={"before": {"loss": 2.5}}, seed=7)
    run.update(metrics={"after": {"loss": np.float32(0.5)}, "before": {"exact_match": 0}})
    run.update(proofs={"fold": {"max_relative_error": torch.tensor(0.25)}}, data=Path("x"))
    record = RunDirectory.open(run.path).read()
    assert record["metrics"] == {"before": {"loss": 2.5, "exact_match": 0}, "after": {"loss": 0.5}}
    assert (record["seed"], record["data"], record["status"]) == (7, "x", "running")
    assert record["proofs"] == {"fold": {"max_relative_error": 0.25}}


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), torch.tensor(-math.inf)])
def test_a_number_json_cannot_hold_is_refused_by_its_key_and_changes_nothing(tmp_path, value):
    run = RunDirectory.create(tmp_path, "demo")
    before = run.record.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.after\.losses\[1\] is"):
        run.update(metrics={"after": {"losses": [1.0, value]}})
    with pytest.raises(TypeError, match=r"model is a object"):
        run.update(model=object())
    assert run.record.read_bytes() == before
    assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]


def test_a_status_is_one_of_four_and_all_but_running_end_the_run(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    assert run.read()["ended"] is None
    with pytest.raises(ValueError, match="Did you mean 'completed'"):
        run.update(status="complete")
    run.update(status="interrupted")
    assert run.read()["ended"].endswith("+00:00")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    file = tmp_path / "run.json"
    files.write_text(file, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_record_is_whole_at_whatever_moment_the_process_is_killed(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    code = (
        "import sys; from pathlib import Path; from moslora.training.run_directory import RunDirectory\n"
        "run = RunDirectory.open(Path(sys.argv[1])); print(flush=True); n = 0\n"
        "while True: n += 1; run.update(n=n, filler=['x' * 100] * 2000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        RunDirectory.open(run.path)
    process.kill()
    process.communicate()
    assert RunDirectory.open(run.path).read()["n"] > 1
    run.claim()
    assert not list(run.path.glob(".*")), "claiming a run sweeps up what the kill left"


# --- metrics.jsonl

finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=25)
@given(losses=st.lists(finite, max_size=12), kept=st.integers(0, 12), torn=st.binary(max_size=6))
def test_after_a_resume_every_step_stands_once(tmp_path_factory, losses, kept, torn):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step, loss in enumerate(losses, 1):
            log.append(step, loss=loss)
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    kept = min(kept, len(losses))
    with MetricsLog(path, resume_step=kept) as log:
        for step, loss in enumerate(losses[kept:], kept + 1):
            log.append(step, loss=loss)
    assert read_metrics(path) == [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


def test_a_line_can_be_read_as_soon_as_it_is_appended(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, loss=torch.tensor(0.5), learning_rate=1e-3)
    assert read_metrics(log.path) == [{"step": 1, "loss": 0.5, "learning_rate": 1e-3}]
    log.close()


def test_a_diverged_loss_is_logged_as_null_and_named(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(3, loss=math.nan, grad_norm=math.inf, epoch=0.5)
    assert read_metrics(log.path) == [
        {"step": 3, "loss": None, "grad_norm": None, "epoch": 0.5, "not_finite": ["loss", "grad_norm"]}
    ]


def test_a_new_log_never_continues_an_old_one_by_accident(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").close()
    with pytest.raises(FileExistsError, match="resume_step"):
        MetricsLog(tmp_path / "metrics.jsonl")


def test_a_damaged_line_that_is_not_the_last_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


# --- alive or not


def test_a_run_is_alive_while_its_process_is(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    assert not is_alive(run), "this process may continue with its own run"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_record(run, pid=other.pid, process_started=files.process_start(other.pid))
    assert is_alive(run)
    with pytest.raises(RuntimeError, match=f"still in progress: process {other.pid}"):
        run.claim()
    write_record(run, process_started=files.process_start(other.pid) - 3600)
    assert not is_alive(run), "the id came again for another process"
    write_record(run, process_started=files.process_start(other.pid), status="interrupted")
    assert not is_alive(run)
    write_record(run, status="running")
    other.kill()
    while files.process_start(other.pid) is not None:  # a zombie counts as gone
        time.sleep(0.01)
    assert not is_alive(run)
    other.communicate()


def test_a_run_of_another_machine_is_alive_while_it_writes(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    write_record(run, host="another-" + socket.gethostname())
    assert is_alive(run)
    long_ago = time.time() - 10 * rundir.HEARTBEAT_SECONDS
    os.utime(run.record, (long_ago, long_ago))
    assert not is_alive(run)
    run.metrics.touch()
    assert is_alive(run)


def test_claiming_a_run_makes_it_this_process_s_and_keeps_its_past(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    run.update(status="failed", error="out of memory", metrics={"before": {"loss": 2.0}})
    started = run.read()["started"]
    run.claim()
    record = run.read()
    assert (record["status"], record["pid"], record["started"]) == ("running", os.getpid(), started)
    assert (record["ended"], "error" in record, len(record["resumed"])) == (None, False, 1)
    assert record["metrics"] == {"before": {"loss": 2.0}}


# --- checkpoints


def test_the_latest_checkpoint_is_the_newest_by_number(tmp_path):
    run = RunDirectory.create(tmp_path, "demo")
    assert run.latest_checkpoint() is None
    for step in (9, 100, 20):
        make_checkpoint(run, step)
    (run.checkpoints / "checkpoint-final").mkdir()
    latest = run.latest_checkpoint()
    assert latest is not None
    assert (latest.step, latest.faults) == (100, ())


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
)
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_checkpoint_that_a_kill_left_unfinished_is_skipped_and_said(tmp_path, name, damage):
    run = RunDirectory.create(tmp_path, "demo")
    make_checkpoint(run, 10)
    if damage == "missing":
        make_checkpoint(run, 20, omit=name)
    else:
        file = make_checkpoint(run, 20) / name
        file.write_bytes(file.read_bytes()[:-7])
    said: list[str] = []
    latest = run.latest_checkpoint(said.append)
    assert latest is not None
    assert latest.step == 10
    assert said == [f"Skipped checkpoint-20, which is incomplete: {name} is {damage}."]
    make_checkpoint(run, 5, omit="optimizer.pt")
    run.remove_incomplete_checkpoints(10)
    assert [checkpoint.step for checkpoint in run.all_checkpoints()] == [5, 10]


# --- where the run ran


def test_versions_and_hardware_are_whole_and_fit_into_the_record(tmp_path):
    versions, hardware = collect_versions(), collect_hardware()
    assert versions["torch"] == torch.__version__
    assert versions["python"] == sys.version.split()[0]
    assert hardware["cores"] >= 1
    assert hardware["memory_bytes"] > 2**28
    RunDirectory.create(tmp_path, "demo").update(versions=versions, hardware=hardware)
