"""The three ends of a reload proof: it passes, it finds a difference, or it cannot be carried out."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import moslora.training.reload_proof.proof as proofs
import tiny
from moslora.display import Display
from moslora.errors import ProofError, Stopped, TrainingError
from moslora.tasks.text.task import TextTask
from moslora.training import proving
from moslora.training.proving import Observed, is_unproven, prove_later
from moslora.training.run import resume, train
from moslora.training.run_directory import RunDirectory

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NO_MEMORY = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def ending(code: int, said: str = NO_MEMORY) -> Any:
    return lambda command, *_: subprocess.CompletedProcess(command, code, "", said)


def nothing() -> None:
    """Nobody asked to stop."""


def test_a_proof_that_cannot_be_carried_out_costs_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_chat_model(tmp_path / "base")
    data = tiny.save_chat_data(tmp_path / "data.jsonl", 12)
    settings = [f"model={tmp_path}/base", f"data={data}", "task.generate_examples=0", "trainer.max_steps=1"]
    held: list[weakref.ref[Any]] = []
    load, build = TextTask.load, TextTask.build_trainer

    def loading(self: TextTask) -> Any:
        model = load(self)
        held.extend((weakref.ref(model), weakref.ref(model.lm_head.weight)))
        return model

    def building(self: TextTask, *given: Any) -> Any:
        trainer: Any = build(self, *given)
        make = trainer.create_optimizer

        def created(*given: Any) -> Any:
            made = make(*given)
            held.append(weakref.ref(trainer.optimizer))
            return made

        trainer.create_optimizer = created
        return trainer

    alive = []

    def without_memory(command: list[str], *_: Any) -> Any:
        alive.append([ref() is not None for ref in held])
        return ending(1)(command)

    monkeypatch.setattr(TextTask, "load", loading)
    monkeypatch.setattr(TextTask, "build_trainer", building)
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "run_script", without_memory)
        said = io.StringIO()
        run = train([*settings, f"output={tmp_path}/runs/a"], Display(said))
    # The fresh process has the memory to itself: base, optimizer and trainer are gone before it starts.
    assert alive == [[False] * 3] and len(held) == 3
    record = run.read()
    assert record["status"] == "completed" and record["proofs"]["reload"]["passed"] is None
    assert run.lora.is_dir() and run.adapter.is_dir() and is_unproven(run)
    told = " ".join(said.getvalue().split())
    assert "Warning: The reload proof could not be carried out" in told and "out of memory" in told
    assert (
        f"Not proven: reload in stock PEFT could not be carried out. To do it: moslora train --resume {run.path}"
        in told
    )
    assert "not carried out" in run.report.read_text()
    # Again without memory: all is as it was.
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "run_script", ending(-9))
        with pytest.raises(TrainingError, match="signal 9"):
            resume(run.path, Display(quiet=True))
    assert is_unproven(run) and run.lora.is_dir()
    # With memory: the way out that the message names.
    assert resume(run.path, Display(quiet=True)).read()["proofs"]["reload"]["passed"]
    reload = run.read()["proofs"]["reload"]
    assert reload["max_logit_difference"] < 1e-3 and reload["reason"] is None
    assert not is_unproven(run) and "not carried out" not in run.report.read_text()
    with pytest.raises(ValueError, match="is completed"):
        resume(run.path, Display(quiet=True))


@pytest.fixture
def unproven(tmp_path: Path) -> RunDirectory:
    """A completed run, as far as its proof is concerned."""
    run = RunDirectory.create(tmp_path, "run")
    run.lora.mkdir()
    (run.path / "kohya.safetensors").touch()
    run.update(status="completed", proofs={"reload": {"passed": None}})
    arguments = {"base": "b", "dtype": "float32", "device": "cpu", "auto_class": "A", "quantization": None}
    given = [{"input_ids": tiny.tokens(1, 4), "mask": torch.ones(1, 4)}, {"": tiny.tokens(1, 3)}]
    seen = Observed(
        [given[0], given[1][""]],
        {"input0": torch.ones(1, 4, 5), "input1": torch.ones(1, 3, 5)},
        {**arguments, "reader": "peft", "variant": None},
        ["lora", "kohya.safetensors"],
    )
    seen.write(run.path / proving.UNPROVEN)
    again = Observed.read(run.path / proving.UNPROVEN)
    assert again.arguments == seen.arguments and again.exports == seen.exports
    assert torch.equal(again.inputs[0]["input_ids"], given[0]["input_ids"])
    assert torch.equal(again.inputs[1], given[1][""]) and again.outputs.keys() == seen.outputs.keys()
    return run


@pytest.mark.parametrize("code", [1, 2, -9, -11, 137])
def test_a_process_that_does_not_come_to_its_end_says_nothing_about_the_adapter(
    code: int, unproven: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proofs, "run_script", ending(code))
    with pytest.raises(TrainingError, match=f"{abs(code)}"):
        prove_later(unproven, Display(quiet=True), nothing)
    assert unproven.lora.is_dir() and unproven.read()["status"] == "completed" and is_unproven(unproven)


@pytest.mark.parametrize(
    "error", [OSError(12, "Cannot allocate memory"), OSError(28, "No space left on device")]
)
def test_a_process_that_cannot_be_started_says_nothing_about_the_adapter(
    error: OSError, unproven: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(proofs, "run_script", fail)
    with pytest.raises(TrainingError, match=str(error.strerror)):
        prove_later(unproven, Display(quiet=True), nothing)
    assert unproven.lora.is_dir() and is_unproven(unproven)


def test_an_adapter_that_the_reader_refuses_is_renamed_and_never_deleted(
    unproven: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unproven.lora / "adapter_model.safetensors").write_bytes(b"what was trained")
    monkeypatch.setattr(proofs, "run_script", ending(proofs.REFUSED, "ValueError: Target modules not found"))
    with pytest.raises(ProofError, match=r"Target modules not found[\s\S]*lora\.rejected"):
        prove_later(unproven, Display(quiet=True), nothing)
    assert (unproven.path / "lora.rejected" / "adapter_model.safetensors").read_bytes() == b"what was trained"
    assert (unproven.path / "kohya.safetensors.rejected").is_file() and not unproven.lora.exists()
    assert unproven.read()["status"] == "failed" and unproven.read()["proofs"]["reload"]["passed"] is False


def test_the_scripts_tell_a_refused_adapter_from_a_base_that_does_not_load(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny.llama().save_pretrained(base)
    (tmp_path / "lora").mkdir()
    inputs = [tiny.tokens(1, 4)]
    live = {"input0": torch.zeros(1, 4, 64)}
    with pytest.raises(ProofError, match="could not run the exported adapter"):
        proofs.prove_reload(live, inputs, str(base), "float32", "cpu", tmp_path / "lora", print)
    with pytest.raises(proofs.CouldNotRun, match="exit code 1"):
        proofs.prove_reload(live, inputs, str(tmp_path / "gone"), "float32", "cpu", tmp_path / "lora", print)


def test_a_request_to_stop_ends_the_fresh_process_at_once() -> None:
    from moslora.training.reload_proof.proof import LOOKS

    looks = []

    def check() -> None:
        looks.append(time.monotonic())
        if len(looks) > 2:
            raise Stopped(15)

    started = subprocess.Popen
    processes = []

    class Watched(started):  # type: ignore[type-arg, misc]
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            processes.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Watched)
        with pytest.raises(Stopped):
            honest_run_script([sys.executable, "-c", "import time; time.sleep(60)"], {}, check)
    assert processes[0].poll() is not None and looks[-1] - looks[0] < 20 * LOOKS
    done = honest_run_script([sys.executable, "-c", "raise SystemExit(3)"], {}, nothing)
    assert done.returncode == 3
    gc.collect()


honest_run_script = proofs.run_script  # conftest.py starts proofs in another way for the length of the tests
