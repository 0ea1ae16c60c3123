"""Two processes under FSDP's first version do what one does, with the policy that Trainer sets for PEFT models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sharded_v1_worker import WAYS
from tolerances import MODEL

PROCESSES = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp1")
    command = [sys.executable, str(Path(__file__).with_name("sharded_v1_worker.py")), str(folder)]
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


@pytest.mark.parametrize("way", [f"{kind}, {how}{', policy' * policy}" for kind, how, policy in WAYS])
def test_two_processes_under_fsdp1_train_as_one(way: str, folder: Path) -> None:
    for rank in range(PROCESSES):
        losses = json.loads((folder / f"{rank}.json").read_text())[way]
        assert losses["together"] == pytest.approx(losses["alone"], rel=MODEL)
        assert losses["alone"][0] - losses["alone"][-1] > 100 * MODEL  # and what it trains moves
