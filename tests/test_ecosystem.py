"""Other libraries' example scripts, with LoRA's class name changed to ours; LoRA itself is the control."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from filelock import FileLock
from peft import LoraConfig
from torch import Tensor, nn

import kinds
import laws
import matrix
import tiny
from ecosystem_scripts import CASTS, NEEDED, SCRIPTS, STEPS, WIDE, Ran, Session, configure
from ecosystem_worker import DEEPSPEED, GROUPS, HELD_SAYS, LORA_SAYS, TORCH, TRAINERS, Case
from moslora import MoSLoRAConfig
from tolerances import LOW_TRAINED, MODEL, MODEL_SNR_DB, SHARE, TRAINED, relative_error, snr_db

# TRL asks transformers for what it calls otherwise now.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated and will be removed in v6:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("ecosystem") / "base")


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_chat_model(tmp_path_factory.mktemp("ecosystem") / "wide", **WIDE)


def start(
    name: str, method: str, base: Path, folder: Path, always: dict[str, Any] | None = None, **settings: Any
) -> Session:
    """Begin a script with one of the methods, all else equal."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    torch.manual_seed(1)
    return {**SCRIPTS, **CASTS}[name](base, folder, configure(method, **(always or {})), **settings)


@pytest.fixture(scope="module")
def ran(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Session, Ran]]:
    """A script's run with a method, made once."""

    @cache
    def run(script: str, method: str) -> tuple[Session, Ran]:
        session = start(script, method, base, tmp_path_factory.mktemp("run"))
        return session, session.run()

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_the_mixer_held_at_the_identity_a_script_logs_what_it_logs_with_lora(
    script: str, ran: Any
) -> None:
    lora, held = (ran(script, method)[1].log for method in ("lora", "held"))
    assert len(lora) == len(held) == STEPS
    for theirs, ours in zip(lora, held, strict=True):
        assert ours == pytest.approx(theirs, rel=TRAINED)
    assert lora[0] != lora[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_in_a_script_every_factor_moves_as_loras_do(script: str, ran: Any) -> None:
    lora, ours = (ran(script, method)[1].moved for method in ("lora", "moslora"))
    assert lora == {"A": 1.0, "B": 1.0}
    assert ours == {"A": 1.0, "M": 1.0, "B": 1.0}


@pytest.mark.parametrize("method", ["lora", "moslora"])
@pytest.mark.parametrize("script", [name for name in SCRIPTS if "diffusers" not in name])
def test_what_a_script_saves_is_what_it_trained(script: str, method: str, ran: Any, tmp_path: Path) -> None:
    session, _ = ran(script, method)
    trained = session.whole or session.models[0]
    session.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with torch.no_grad():
        assert relative_error(session.output(session.load(tmp_path)), session.output(trained)) < MODEL


@pytest.mark.parametrize("method", ["lora", "moslora"])
@pytest.mark.parametrize("script", ["PEFT examples/sft", "diffusers dreambooth"])
def test_a_script_that_is_resumed_from_its_checkpoint_goes_on_as_if_it_had_not_stopped(
    script: str, method: str, base: Path, tmp_path: Path
) -> None:
    whole, again = (start(script, method, base, tmp_path, **more) for more in ({}, {"resume": True}))
    log = whole.run().log
    assert (tmp_path / "checkpoint-2").is_dir()
    assert again.run().log[-1] == pytest.approx(log[-1], rel=MODEL)
    for (_, one), (_, two) in zip(whole.factors(), again.factors(), strict=True):
        assert relative_error(two, one) < MODEL


# ---- casts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, float]]:
    """The share of entries that moved under a cast, by factor, with a method."""

    @cache
    def run(cast: str, method: str, use_dora: bool = False) -> dict[str, float]:
        return (
            start(cast, method, wide_base, tmp_path_factory.mktemp("cast"), {"use_dora": use_dora})
            .run()
            .moved
        )

    return run


@pytest.mark.parametrize(
    ("cast", "mixer"),
    [*((cast, "moslora") for cast in CASTS), ("TRL over a quantized base", "moslora, orthogonal")],
)
def test_however_a_trainer_casts_the_mixer_moves_as_loras_factors_do(
    cast: str, mixer: str, moved: Any
) -> None:
    lora, ours = moved(cast, "lora"), moved(cast, mixer)
    assert (
        lora["A"] > 0.8 and lora["B"] == 1
    )  # a mixer that is trained as A is would move by less than a half
    assert ours == pytest.approx({**lora, "M": 1.0}, abs=SHARE)


@pytest.mark.filterwarnings("ignore:DoRA's magnitude is held in torch.bfloat16:UserWarning")  # as asked for
@pytest.mark.parametrize("cast", [name for name in CASTS if "diffusers" not in name])
def test_however_a_trainer_casts_the_magnitude_moves_as_loras_does(cast: str, moved: Any) -> None:
    lora, ours = (dict(moved(cast, method, use_dora=True)) for method in ("lora", "moslora"))
    theirs = lora.pop("magnitude")
    assert theirs == 1 or not cast.startswith("TRL")  # which spares it, by its name
    assert ours.pop("magnitude") >= theirs - SHARE
    assert ours == pytest.approx({**lora, "M": 1.0}, abs=SHARE)


# ---- accelerate: offloading ------------------------------------------------------------------------------------


def on_cpu(model: nn.Module, folder: Path) -> nn.Module:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    """The second block on the disk, all else here."""
    inside = {
        f"base_model.model.model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")
    }
    places = {**inside, "base_model.model.lm_head": "cpu", "base_model.model.model.layers.1": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def outputs(
    kind: kinds.Kind, cls: type, offload: Any, folder: Path, **settings: Any
) -> tuple[Tensor, list[Tensor]]:
    """What an adapted model gives in memory, and three times when it is offloaded."""
    build = kind.build if cls is MoSLoRAConfig or kind.reference is None else kind.reference
    with kind.known(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each kind has its tests of what is warned of
        model = laws.adapt(build, cls, **{**kind.settings, **settings})
        expected = matrix.run(kind, model)
        model = offload(model, folder)
        return expected, [matrix.run(kind, model) for _ in range(3)]


def close(found: Tensor, expected: Tensor) -> bool:
    if expected.dtype == torch.float32:
        return relative_error(found, expected) < MODEL
    return snr_db(found, expected) > MODEL_SNR_DB[expected.dtype]


# Kinds of model whose LoRA does not run offloaded: it reads its factors past their modules, as ours once did.
READ_BY_LORA = ("Embedding", "tied embedding", "Multihead-Attention", "Mixtral", "Qwen3-MoE", "gpt-oss")


@pytest.mark.parametrize("name", kinds.ALL)
def test_an_offloaded_model_gives_the_same_output_at_each_call(name: str, tmp_path: Path) -> None:
    expected, found = outputs(kinds.ALL[name], MoSLoRAConfig, on_cpu, tmp_path)
    assert all(close(output, expected) for output in found)
    if name in READ_BY_LORA:
        with pytest.raises(RuntimeError):
            outputs(kinds.ALL[name], LoraConfig, on_cpu, tmp_path)
    else:
        expected, found = outputs(kinds.ALL[name], LoraConfig, on_cpu, tmp_path)
        assert all(close(output, expected) for output in found)


@pytest.mark.parametrize("offload", [on_cpu, on_disk, dispatched])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_an_offloaded_llama_gives_the_same_output_with_every_start(
    settings: dict[str, Any], offload: Any, tmp_path: Path
) -> None:
    expected, found = outputs(kinds.ALL["Llama"], MoSLoRAConfig, offload, tmp_path, **settings)
    assert all(close(output, expected) for output in found)


# ---- several processes -----------------------------------------------------------------------------------------


PROCESSES = 2


def run_processes(folder: Path, group: str) -> None:
    """Let the processes of ecosystem_worker.py train; whoever comes later waits for what the first found."""
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / "0.json").is_file():
            return
        tiny.save_chat_model(folder / "base")
        command = [sys.executable, str(Path(__file__).with_name("ecosystem_worker.py")), str(folder), group]
        workers = [
            subprocess.Popen(
                [*command, str(rank), str(PROCESSES)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "DS_ACCELERATOR": "cpu"},
            )
            for rank in range(PROCESSES)
        ]
        try:
            errors = [worker.communicate(timeout=600)[1] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()  # one that waits for another that has failed
        assert not any(worker.returncode for worker in workers), errors


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[dict[str, Any]]]:
    """What each process found in a case."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    @cache
    def results(group: str) -> list[dict[str, Any]]:
        folder = root / f"ecosystem-{group}"
        run_processes(folder, group)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]

    return lambda group, case: [result[case] for result in results(group)]


def counted(processes: list[dict[str, Any]], method: str) -> dict[str, float]:
    """The share of entries that moved, of what all processes hold."""
    totals: dict[str, list[int]] = {}
    for process in processes:
        for letter, counts in process[method]["together"]["moved"].items():
            totals.setdefault(letter, []).append(counts)
    return {letter: sum(n for n, _ in all) / max(sum(n for _, n in all), 1) for letter, all in totals.items()}


def hold_to_one_process(group: str, case: str, processes: list[dict[str, Any]]) -> None:
    declared: Case = GROUPS[group][case]
    tolerance = LOW_TRAINED if declared.is_low else MODEL
    for process in processes:
        for method, result in process.items():
            says = {"lora": LORA_SAYS, "held": HELD_SAYS}.get(method, {})
            if case in says:
                assert says[case] in result["error"]
                continue
            assert "error" not in result, (method, result["error"])
            alone, together = result["alone"]["losses"], result["together"]["losses"]
            assert together == pytest.approx(alone, rel=tolerance), method
            assert abs(alone[-1] - alone[0]) > 10 * MODEL * alone[0]
            assert result.get("drift", 0) == 0, method
            if method == "held":
                lora = process["lora"]["alone"]["losses"]
                assert alone == pytest.approx(lora, rel=tolerance)
            lost = any("was sharded in torch.bfloat16" in warning for warning in result["warned"])
            assert lost == (declared.is_cast and method == "moslora")
    moved = counted(processes, "moslora")
    assert declared.is_cast or moved.get("M", 0) >= moved.get("A", 0) - SHARE


@pytest.mark.parametrize("case", TORCH)
def test_several_processes_train_as_one(case: str, found: Any) -> None:
    hold_to_one_process("torch", case, found("torch", case))


@pytest.mark.parametrize("case", DEEPSPEED)
def test_several_processes_of_deepspeed_train_as_one(case: str, found: Any) -> None:
    pytest.importorskip("deepspeed")
    hold_to_one_process("deepspeed", case, found("deepspeed", case))


@pytest.mark.parametrize("method", ["lora", "held", "moslora"])
@pytest.mark.parametrize("way", TRAINERS)
def test_trainer_logs_with_several_processes_what_it_logs_with_one(
    way: str, method: str, found: Any, ran: Any
) -> None:
    alone = ran("transformers causal LM", method)[1].log
    for process in found("torch", way):
        result = process[method]
        assert "error" not in result, result["error"]
        for one, several in zip(alone, result["log"], strict=True):
            assert several == pytest.approx(one, rel=LOW_TRAINED if "bf16" in way else TRAINED)


@pytest.mark.parametrize("method", ["lora", "moslora"])
@pytest.mark.parametrize("way", ["Trainer, DDP", "Trainer, FSDP2", "Trainer, FSDP2, bf16"])
def test_what_trainer_saves_with_several_processes_is_whole(
    way: str, method: str, found: Any, ran: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found("torch", way)
    session, _ = ran("transformers causal LM", method)
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    loaded = session.load(root / "ecosystem-torch" / "saved" / way / method)
    pair = session.output(loaded), session.output(session.models[0])
    if "bf16" in way:
        assert snr_db(*pair) > MODEL_SNR_DB[torch.bfloat16]
    else:
        assert relative_error(*pair) < TRAINED
