"""Two processes on one machine do what one does, and what they save is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import tiny
from distributed_worker import WAYS, adapted, loss_of, train
from moslora.tuner.sharding import check_whole
from tolerances import MODEL

PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed_worker.py")
    command = [sys.executable, str(script), str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), str(PROCESSES)], stderr=subprocess.PIPE, text=True)
        for rank in range(PROCESSES)
    ]
    try:
        errors = [worker.communicate(timeout=300)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()  # one that waits for another that has failed
    assert not any(worker.returncode for worker in workers), errors
    return folder


def results(folder: Path, way: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text())[way] for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], nn.Module]:
    model = adapted()
    return train(model), model


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_as_one(way: str, folder: Path, alone: tuple[list[float], nn.Module]) -> None:
    losses, model = alone
    for result in results(folder, way):
        assert result["losses"] == pytest.approx(losses, rel=MODEL)
        assert result["trained"] == pytest.approx(loss_of(model), rel=MODEL)
        assert abs(result["trained"] - loss_of(adapted())) > 100 * MODEL


@pytest.mark.parametrize("way", WAYS)
def test_what_two_processes_save_is_whole(
    way: str, folder: Path, alone: tuple[list[float], nn.Module]
) -> None:
    loaded = PeftModel.from_pretrained(tiny.llama(), folder / way)
    assert loss_of(loaded) == pytest.approx(loss_of(alone[1]), rel=MODEL)


def test_flattened_shards_are_refused_with_the_way_out(folder: Path) -> None:
    """Some processes have parts, some nothing at all; PEFT would have written it."""
    for result in results(folder, "fsdp1"):
        assert "a part of a sharded parameter" in result["saving"]
        assert "summon_full_params" in result["saving"]
    for way in ("ddp", "fsdp2"):
        assert all(result["saving"] == "" for result in results(folder, way))


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_sharded_model_takes_an_adapter_in(way: str, folder: Path) -> None:
    for result in results(folder, way):
        for source in ("from file", "from memory"):
            assert result[source] == pytest.approx(result["trained"], rel=MODEL)
        assert abs(loss_of(adapted(seed=3)) - result["trained"]) > 100 * MODEL  # what it had before


def test_merging_into_shards_is_refused_and_disabling_works(folder: Path) -> None:
    """Merged weights would not arrive in the shards, and the adapter be left out as merged."""
    for result in results(folder, "fsdp2"):
        assert "Cannot merge" in result["merging"] and "moslora merge" in result["merging"]
        assert result["disabled"] == pytest.approx(loss_of(tiny.llama()), rel=MODEL)
        assert result["after"] == result["trained"]


def test_an_adapter_that_comes_after_the_shards_is_said_not_to_train(folder: Path) -> None:
    for result in results(folder, "fsdp2"):
        assert any("gradients are not averaged" in text and "'late'" in text for text in result["late"])


def test_an_empty_factor_is_refused_whoever_left_it_so() -> None:
    whole = {"layer.moslora_A.weight": torch.ones(2, 3), "norm.weight": torch.ones(3)}
    check_whole(whole)
    check_whole({})  # what all processes but one get from a gathering
    for shape in ((0,), (6,), (0, 3)):
        with pytest.raises(RuntimeError, match=r"moslora_A.*nothing was saved.*GatheredParameters"):
            check_whole({**whole, "layer.moslora_A.weight": torch.ones(shape)})
