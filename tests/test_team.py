"""Two processes that torchrun starts train one adapter, as one process does, and leave one run."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import moslora.training.run
import tiny
import tiny_pipelines
from moslora.cli import app
from moslora.display import Display
from moslora.distributed import Team, environment_alone, launched
from moslora.errors import Stopped
from moslora.training.run import resume, train
from moslora.training.run_directory import RunDirectory
from moslora.training.stop import StopRequest
from tiny_labeled import rows_of, write
from tolerances import MODEL, relative_error

WORKER = Path(__file__).with_name("team_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(torchvision|truncated|legacy behaviour).*",
    "ignore:__array__ implementation:DeprecationWarning",  # of diffusers' schedulers, by numpy
    "ignore::FutureWarning",
)


def launch(*what: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LAUNCH, *what], capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_pipelines.sdxl().save_pretrained(folder / "sdxl")
    (folder / "pictures").mkdir()
    for number in range(3):
        values = numpy.random.default_rng(number).integers(0, 255, (20, 24, 3), dtype=numpy.uint8)
        Image.fromarray(values).save(folder / "pictures" / f"{number}.png")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 5)
    return folder


def pictures(world: Path, out: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "task": "image",
        "model": world / "sdxl",
        "data": world / "pictures",
        "data.prompt": "a x cat",
        "data.resolution": 16,
        "task.inference_steps": 1,
        "task.loss_draws": 1,
        "task.prompts": "['a x cat on ice']",
        "task.pictures_every": 2,
        "trainer.per_device_train_batch_size": 1,
        "trainer.max_steps": 4,
        "trainer.learning_rate": 0.01,
        "output": out / "run",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def texts(world: Path, out: Path, **changes: object) -> list[str]:
    settings: dict[str, object] = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        **({} if "task" in changes else {"task.generate_examples": 0}),
        "adapter.r": 4,
        "trainer.max_steps": 4,
        "trainer.per_device_train_batch_size": 2,
        "trainer.optim": "sgd",  # Adam would make large differences of the smallest gradients
        "trainer.learning_rate": 1.0,
        "output": out / "run",
    }
    return [f"{key}={value}" for key, value in {**settings, **changes}.items()]


def labels(world: Path, out: Path, **changes: object) -> list[str]:
    rows = write(world / "labels.jsonl", rows_of("multi-label", 24))
    heldout = write(world / "labels-heldout.jsonl", rows_of("multi-label", 5, seed=7))
    return texts(world, out, task="classification", data=rows, **{"data.heldout": heldout}, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "adapter").rglob("adapter_model.safetensors")
    return load_file(file)


def pairs(world: Path, out: Path, **changes: object) -> list[str]:
    """Preferences, whose reference is computed by both processes, each its share."""
    data = world / "pairs.jsonl"
    rows = [{"prompt": f"say {i}", "chosen": f"{i} it is", "rejected": f"no {i % 2}"} for i in range(18)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"task": "preference", "task.generate_examples": 0, "data": data, "data.heldout": "null"}
    return texts(world, out, **{"task.metric": "none", **settings, **changes})


# What takes part in random numbers: dropout of each process, and pictures of the class, made by whoever comes first.
RANDOM = {"adapter.lora_dropout": 0.2, "data.class_prompt": "a cat", "data.class_count": 2}


@pytest.fixture(scope="module")
def together(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes from beginning to end."""
    out = tmp_path_factory.mktemp("together")
    changes = {**RANDOM, "data.class_images": out / "class"}
    done = launch("-m", "moslora", "train", "--json", *pictures(world, out, **changes))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "completed"  # said once
    assert done.stderr.count("Proven: fold") == 1 and "2 rows to a step" in done.stderr
    return out / "run"


def test_two_processes_leave_one_run_measured_kept_and_proven_once(together: Path) -> None:
    assert [path.name for path in together.parent.glob("run*")] == ["run"]
    record = RunDirectory.open(together).read()
    assert record["status"] == "completed" and record["processes"] == 2
    assert all(proof["passed"] for proof in record["proofs"].values())
    assert list(record["pictures"]["during"]) == ["2"]
    steps = [json.loads(line)["step"] for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 4]  # and a summary
    assert sorted(path.suffix for path in (together.parent / "class").iterdir()) == [".json", ".png", ".png"]


@pytest.mark.parametrize(
    "settings", [pictures, *(pytest.param(s, marks=pytest.mark.trial) for s in (texts, pairs, labels))]
)
def test_two_processes_train_as_one_that_takes_twice_as_many_batches_to_a_step(
    settings: object, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(settings)
    done = launch("-m", "moslora", "train", *settings(world, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    changes = {"trainer.gradient_accumulation_steps": 2}
    one = train(settings(world, tmp_path / "one", **changes), Display(quiet=True))
    half = train(settings(world, tmp_path / "half"), Display(quiet=True))
    two = weights(tmp_path / "two" / "run")
    assert two.keys() == weights(one.path).keys()
    for name, tensor in weights(one.path).items():
        assert relative_error(two[name], tensor) < MODEL, name
    assert any(relative_error(two[name], tensor) > 10 * MODEL for name, tensor in weights(half.path).items())


def test_a_signal_to_one_process_stops_all_at_one_step_and_they_go_on_to_the_same_weights(
    together: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**RANDOM, "data.class_images": together.parent / "class"}
    done = launch(str(WORKER), "1", "2", *pictures(world, tmp_path, **changes))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"stopped by {int(signal.SIGTERM)}") == 2
    run = RunDirectory.open(tmp_path / "run")
    assert run.read()["status"] == "interrupted"
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 2
    assert {f.name for f in checkpoint.path.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    done = launch("-m", "moslora", "train", "--resume", str(run.path))
    assert done.returncode == 0, done.stderr
    assert "another number of processes" not in done.stdout
    assert run.read()["status"] == "completed"
    assert all(torch.equal(weights(run.path)[name], tensor) for name, tensor in weights(together).items())
    # One process alone can continue too, to other weights, and says so.
    for place in ("adapter", "checkpoints/checkpoint-4"):
        (run.path / place).rename(tmp_path / place.replace("/", "-"))
    run.update(status="interrupted")
    monkeypatch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
    monkeypatch.setattr(moslora.training.run, "show_result", lambda *_: None)
    said: list[str] = []
    monkeypatch.setattr(Display, "warn", lambda _, text: said.append(text))
    resume(run.path, Display(quiet=True))
    assert any("another number of processes" in text for text in said)
    assert not all(torch.equal(weights(run.path)[name], tensor) for name, tensor in weights(together).items())


def test_verbs_that_know_nothing_of_other_processes_refuse_to_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 1  # some clusters set this for everything that runs there
    monkeypatch.setenv("RANK", "1")
    for verb in (["inspect", str(tmp_path)], ["merge", "a", "b", "c"], ["compare", "model=a"]):
        found = CliRunner().invoke(app, verb)
        assert found.exit_code == 2 and "2 processes were launched" in found.output, verb


def test_a_signal_to_another_process_waits_until_all_agree() -> None:
    for rank in (0, 1):
        stop = StopRequest(Display(quiet=True), Team(rank, 2))
        stop.received = signal.SIGTERM
        with pytest.raises(Stopped) if rank == 0 else contextlib.nullcontext():
            stop.check()


def test_a_process_to_be_alone_is_told_nothing_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "ELSEWHERE"):
        monkeypatch.setenv(name, "2")
    found = environment_alone()
    assert found["ELSEWHERE"] == "2" and not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & found.keys()


def test_a_process_alone_waits_for_nobody() -> None:
    team = Team.join()
    assert team.is_main_process and team.size == 1 and team.broadcast("x") == "x" and team.maximum(3) == 3
    assert team.gather("x") == ["x"]
    told: list[object] = []
    squares = team.share(range(3), lambda number: number**2, lambda *done: told.append(done))
    assert squares == [0, 1, 4] and told == [([0], 0), ([1], 1), ([2], 4)]
    team.wait()
    team.shut_down()
