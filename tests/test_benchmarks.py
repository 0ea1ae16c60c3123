"""Each benchmark runs at tiny sizes and leaves a whole result. What it measures is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {
    "layer.py": "--sizes 32 --tokens 8 --ranks 4 --rounds 2",
    "step.py": "--layers 1 --hidden 32 --inner 48 --heads 4 --kv-heads 2 --rounds 2 --rows 1 --length 8 --rank 4",
}


@pytest.mark.parametrize("script", TINY)
def test_a_benchmark_writes_a_result_that_says_where_it_was_measured(script: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(BENCHMARKS / script),
        *TINY[script].split(),
        "--device",
        "cpu",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert {"question", "device_name", "versions", "hardware", "seed"} <= result.keys()
    for case in result.get("cases", [result]):
        assert case["contenders"]["MoSLoRA"]["saved_bytes"] > 0
        assert all(found["over_floor"] > 0 for found in case["contenders"].values())


def test_trainings_over_one_base_are_timed_beside_one_alone(tmp_path: Path) -> None:
    base, data = tiny.save_chat_model(tmp_path / "base"), tiny.save_chat_data(tmp_path / "data.jsonl")
    out = tmp_path / "result.json"
    flags = [
        "--cells",
        "1,2",
        "--rounds",
        "2",
        "--rank",
        "2",
        "--rows",
        "2",
        "--model",
        str(base),
        "--data",
        str(data),
    ]
    command = [sys.executable, str(BENCHMARKS / "together.py"), *flags, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert (
        result["contenders"].keys() == {"alone", "1", "2"}
        and result["contenders"]["alone"]["over_floor"] == 1
    )
    assert {"device_name", "versions", "hardware", "seed"} <= result.keys()


def test_a_job_has_the_losses_of_trl_with_peft_lora_when_the_adapter_is_the_same(tmp_path: Path) -> None:
    base, data = tiny.save_chat_model(tmp_path / "base"), tiny.save_chat_data(tmp_path / "data.jsonl")
    out = tmp_path / "result.json"
    flags = ["--steps", "2", "--rows", "2", "--rounds", "1", "--rank", "4", "--device", "cpu"]
    command = [sys.executable, str(BENCHMARKS / "job.py"), *flags, "--model", str(base), "--data", str(data)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["largest_loss_difference"] < 5e-5
    assert result["contenders"].keys() == {"MoSLoRA", "TRL + PEFT LoRA"}
    assert all(found["peak_bytes"] > 0 for found in result["contenders"].values())
