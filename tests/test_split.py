"""Processes that split the model, or what its training needs, between them train as one does, and leave one run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moslora.training.run
import tiny
from moslora.cli import app
from moslora.display import Display
from moslora.distributed import Team
from moslora.errors import RecipeError, UsageError
from moslora.recipe.loading import load_recipe
from moslora.recipe.parallel import parallel_arguments, settle_parallel
from moslora.training.checkpoints import Checkpoint, checkpoint_faults, engine_of, processes_of
from moslora.training.measuring import read_evaluation
from moslora.training.run import train
from moslora.training.run_directory import RunDirectory
from tolerances import MODEL, relative_error

WORKER = Path(__file__).with_name("team_worker.py")
RECIPES = Path(__file__).parents[1] / "recipes"
NEVER = ("9", "9")  # a rank and a step that there are not

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def launch(*what: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    return subprocess.run(
        [*command, str(WORKER), *what],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny.save_chat_model(folder / "base")
    tiny.save_chat_data(folder / "train.jsonl", 24)
    tiny.save_chat_data(folder / "heldout.jsonl", 5)
    return folder


def settings(world: Path, out: Path, **changes: object) -> list[str]:
    given: dict[str, object] = {
        "model": world / "base",
        "data": world / "train.jsonl",
        "data.heldout": world / "heldout.jsonl",
        "task.generate_examples": 3,
        "task.max_new_tokens": 4,
        "evaluation.also": "[]",
        "adapter.r": 4,
        "trainer.max_steps": 4,
        "trainer.per_device_train_batch_size": 2,
        "trainer.learning_rate": 0.1,
        "trainer.adam_epsilon": 0.1,  # a usual one would make large differences of the smallest gradients
        "output": out / "run",
    }
    return [f"{key}={value}" for key, value in {**given, **changes}.items()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, which takes twice as many batches to a step."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moslora.training.run, "prove_reloaded", lambda *_: None)
        patch.setattr(moslora.training.run, "show_result", lambda *_: None)
        changes = {"trainer.gradient_accumulation_steps": 2}
        return train(settings(world, out, **changes), Display(quiet=True)).path


@pytest.fixture(scope="module")
def split(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of two processes from beginning to end, by its kind."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind.startswith("zero"):
            pytest.importorskip("deepspeed")
        if kind not in made:
            out = tmp_path_factory.mktemp(kind)
            done = launch(*NEVER, *settings(world, out, **{"parallel.kind": kind}))
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("Proven: fold") == 1
            made[kind] = out / "run"
        return made[kind]

    return run


KINDS = [
    "fsdp",
    *(pytest.param(kind, marks=pytest.mark.trial) for kind in ("ddp", "zero1", "zero2", "zero3")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_processes_measure_and_train_is_what_one_does(
    kind: str, split: Callable[[str], Path], alone: Path
) -> None:
    together = split(kind)
    one, two = RunDirectory.open(alone), RunDirectory.open(together)
    record = two.read()
    assert record["status"] == "completed" and record["processes"] == 2
    assert record["proofs"]["fold"]["passed"] and record["proofs"]["reload"]["passed"]
    assert record["total_parameters"] == one.read()["total_parameters"]
    assert record["trainable_parameters"] == one.read()["trainable_parameters"]
    assert losses(together) == pytest.approx(losses(alone), rel=MODEL)
    expected, found = weights(alone), weights(together)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < MODEL, name
    for stage in ("before", "after"):
        theirs, ours = read_evaluation(one, stage), read_evaluation(two, stage)
        assert theirs is not None and ours is not None
        assert ours.metrics["loss"] == pytest.approx(theirs.metrics["loss"], rel=MODEL)
        assert [answer.text for answer in ours.answers] == [answer.text for answer in theirs.answers]
    assert abs(record["metrics"]["after"]["loss"] - record["metrics"]["before"]["loss"]) > 100 * MODEL


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_no_weight_of_the_base(kind: str, split: Callable[[str], Path]) -> None:
    checkpoint = RunDirectory.open(split(kind)).latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 4
    assert processes_of(checkpoint.path) == 2
    for file in checkpoint.path.rglob("*"):
        if file.suffix in (".pt", ".bin") and file.name != "training_args.bin":
            assert zipfile.is_zipfile(file)
            held = torch.load(file, weights_only=False)
            assert not [name for name in names_in(held) if "embed_tokens" in name or "base_layer" in name], (
                file
            )


def names_in(value: Any) -> list[str]:
    """Names of all tensors in nested dictionaries."""
    if not isinstance(value, dict):
        return []
    own = [str(name) for name, one in value.items() if isinstance(one, torch.Tensor)]
    return own + [name for one in value.values() for name in names_in(one)]


@pytest.mark.trial
@pytest.mark.parametrize("kind", ["fsdp", "zero2", "zero3"])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    kind: str, split: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    whole = split(kind)
    done = launch("1", "2", *settings(world, tmp_path, **{"parallel.kind": kind}))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"stopped by {int(signal.SIGTERM)}") == 2
    run = RunDirectory.open(tmp_path / "run")
    assert run.read()["status"] == "interrupted"
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None and checkpoint.step == 2
    done = launch(*NEVER, "--resume", str(run.path), *(["zero"] if kind != "fsdp" else []))
    assert done.returncode == 0, done.stderr
    assert run.read()["status"] == "completed"
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run.path)[name], tensor), name
    if kind == "fsdp":  # another number of processes goes on, too, and says so
        for place in ("adapter", "checkpoints/checkpoint-4"):
            (run.path / place).rename(tmp_path / place.replace("/", "-"))
        run.update(status="interrupted")
        done = launch(*NEVER, "--resume", str(run.path), processes=3)
        assert done.returncode == 0, done.stderr
        assert "another number of processes" in done.stdout
        assert run.read()["status"] == "completed" and run.read()["processes"] == 3


@pytest.mark.trial
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_others_and_the_run_can_go_on(
    kind: str, split: Callable[[str], Path], world: Path, tmp_path: Path
) -> None:
    changes = {"parallel.kind": kind, "trainer.save_steps": 2}
    done = launch("1", "3", *settings(world, tmp_path, **changes), TEAM_SIGNAL=str(int(signal.SIGKILL)))
    assert done.returncode != 0 and "moslora train --resume" in done.stdout + done.stderr
    run = RunDirectory.open(tmp_path / "run")
    done = launch(*NEVER, "--resume", str(run.path))
    assert done.returncode == 0, done.stderr
    assert run.read()["status"] == "completed"
    for name, tensor in weights(split(kind)).items():
        assert torch.equal(weights(run.path)[name], tensor), name


# ---- what is refused, before anything is loaded ----------------------------------------------------------------


MINIMUM = ("model=a/b", "data=c/d")


def settled(monkeypatch: pytest.MonkeyPatch, *given: str, processes: int = 2, **environment: str) -> Any:
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))]:
        monkeypatch.delenv(name)
    for name, value in {"RANK": "0", "WORLD_SIZE": str(processes), **environment}.items():
        monkeypatch.setenv(name, value)
    return settle_parallel(load_recipe([*MINIMUM, *given])).parallel.kind


def test_the_recipe_or_accelerate_says_how_a_model_is_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert settled(monkeypatch) == "ddp"
    assert settled(monkeypatch, processes=1) == "auto"
    assert settled(monkeypatch, "parallel.kind=fsdp") == "fsdp"
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    assert settled(monkeypatch, **fsdp) == settled(monkeypatch, "parallel.kind=fsdp", **fsdp) == "fsdp"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    zero = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert settled(monkeypatch, **zero, ACCELERATE_DEEPSPEED_ZERO_STAGE="3") == "zero3"
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert settled(monkeypatch, **zero, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file)) == "zero1"


@pytest.mark.parametrize(
    ("given", "environment", "said"),
    [
        (
            ["trainer.fsdp=full_shard"],
            {},
            "trainer.fsdp is decided by the section parallel: set parallel.kind",
        ),
        ([], {"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor parallelism"),
        ([], {"PARALLELISM_CONFIG_CP_SIZE": "2"}, "context parallelism"),
        ([], {"PARALLELISM_CONFIG_SP_SIZE": "2"}, "sequence parallelism"),
        ([], {"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ([], {"ACCELERATE_USE_FSDP": "true"}, "FSDP's first version"),
        (
            [],
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
            "the whole model would be gathered at once",
        ),
        ([], {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO of stage 0"),
        (
            [],
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "missing.json"},
            "missing.json cannot be read",
        ),
        (
            ["parallel.kind=ddp"],
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            "parallel.kind is ddp, and accelerate's configuration asks for fsdp",
        ),
        (
            ["parallel.kind=fsdp", "task=preference", "task.metric=none"],
            {},
            "task.kind=preference cannot be set",
        ),
        (["parallel.kind=fsdp", "adapter.bias=all"], {}, "adapter.bias cannot be set"),
        (["parallel.kind=fsdp", "trainer.torch_compile=true"], {}, "trainer.torch_compile cannot be set"),
        (["parallel.kind=zero3", "model.quantization=nf4"], {}, "DeepSpeed does not split 4-bit weights"),
    ],
)
def test_what_a_run_cannot_do_is_refused_by_its_name(
    given: list[str], environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises((UsageError, RecipeError), match=said):
        settled(monkeypatch, *given, **environment)


def test_one_process_alone_splits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"this one is alone.*torchrun --nproc-per-node"):
        settled(monkeypatch, "parallel.kind=fsdp", processes=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install deepspeed"):
        settled(monkeypatch, "parallel.kind=zero2")


def test_a_recipe_says_nothing_of_processes_where_it_was_given_nothing() -> None:
    assert "parallel" not in load_recipe(MINIMUM).sections()
    assert load_recipe([*MINIMUM, "parallel.kind=fsdp"]).sections()["parallel"] == {"kind": "fsdp"}
    assert parallel_arguments(load_recipe(MINIMUM)) == {}


def checkpoint_of(folder: Path, engine: str, processes: int = 2) -> Path:
    """Files as an engine leaves them, with nothing in them."""
    folder.mkdir(parents=True)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    names = ["scheduler.pt", *(f"rng_state_{rank}.pth" for rank in range(processes))]
    if engine == "fsdp":
        names += ["optimizer.bin", "pytorch_model_fsdp.bin"]
    elif engine == "zero":
        (folder / "latest").write_text("global_step2")
        (folder / "global_step2").mkdir()
        names += [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(processes)]
    else:
        names.append("optimizer.pt")
    for name in names:
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    return folder


@pytest.mark.parametrize("engine", ["plain", "fsdp", "zero"])
def test_a_checkpoint_is_whole_only_with_all_files_of_its_engine(engine: str, tmp_path: Path) -> None:
    folder = checkpoint_of(tmp_path / "checkpoint-2", engine)
    assert engine_of(folder) == engine and processes_of(folder) == 2
    assert not list(checkpoint_faults(folder, 2))
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.unlink()
        if not file.name.startswith("rng_state"):  # of which another number of processes leaves another
            assert list(checkpoint_faults(folder, 2)), file
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("engine", "kind", "said"),
    [
        ("plain", "fsdp", "was written under one process or ddp, and parallel.kind=fsdp cannot read"),
        ("fsdp", "ddp", "was written under fsdp"),
        ("zero", "auto", "was written under DeepSpeed's ZeRO"),
        ("zero", "zero2", "was written by 3 processes"),
        ("fsdp", "fsdp", None),
    ],
)
def test_another_engines_checkpoint_is_refused_and_not_half_read(
    engine: str, kind: str, said: str | None, tmp_path: Path
) -> None:
    from moslora.training.fitting import _refuse_other_engine

    folder = checkpoint_of(tmp_path / "checkpoint-2", engine, processes=3)
    recipe = load_recipe([*MINIMUM, f"parallel.kind={kind}"])
    run = SimpleNamespace(recipe=recipe, team=Team(0, 2))
    context = contextlib.nullcontext() if said is None else pytest.raises(UsageError, match=said)
    with context:
        _refuse_other_engine(run, Checkpoint(folder, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ddp", "ddp"), ("fsdp2", "fsdp"), ("zero2", "zero2"), ("zero3", "zero3"), ("two-hosts", "fsdp")],
)
def test_the_shipped_configurations_ask_accelerate_for_what_they_say(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = RECIPES / "accelerate" / f"{name}.yaml"
    own = ["--main_process_ip", "127.0.0.1"] if name == "two-hosts" else []
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(file), *own, "-m", "moslora", "train", "my.yaml"]
    )
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = (
            ""  # what accelerate sets where DeepSpeed is installed
        )
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    asked = {n: v for n, v in environment.items() if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_"))}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert settled(monkeypatch, **asked) == kind
    assert kind in file.read_text().split("\n")[0]


def test_the_recipe_of_a_70b_splits_it() -> None:
    recipe = load_recipe([str(RECIPES / "llama3-70b.yaml")])
    assert recipe.parallel.kind == "fsdp"
    assert parallel_arguments(recipe)["fsdp_config"]["version"] == 2


def test_a_comparison_splits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["compare", *MINIMUM, "parallel=fsdp"])
    assert found.exit_code == 2 and "a comparison trains in one process" in found.output
