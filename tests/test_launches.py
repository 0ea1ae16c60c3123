"""What an adapted layer asks of a GPU, counted without one: no more than recorded, and less moved than by LoRA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "launches.json").read_text())["rows"]
OURS, THEIRS = "MoSLoRA", "PEFT LoRA"


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import launches

        return [launches.compare(case) for case in launches.CASES]
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_nothing_grows(counted: list[dict[str, Any]]) -> None:
    for row, recorded in zip(counted, ROWS, strict=True):
        for what in ("launches", "bytes", "kept"):
            assert row[OURS][what] <= recorded[OURS][what], (recorded, what)


def test_less_memory_is_moved_and_kept_than_by_lora(counted: list[dict[str, Any]]) -> None:
    for row in counted:
        assert row[OURS]["bytes"] < row[THEIRS]["bytes"], row
        narrow = (
            row["factors"] == "bfloat16"
        )  # LoRA keeps no copies of factors in that dtype, ours those of rank r
        assert row[OURS]["kept"] <= row[THEIRS]["kept"] + narrow * 1e6, row


def test_no_more_is_launched_where_factors_are_in_32_bits(counted: list[dict[str, Any]]) -> None:
    plain = [
        row for row in counted if row["factors"] == "float32" and not row["dora"] and not row["checkpointed"]
    ]
    assert len(plain) == 5
    for row in plain:
        assert row[OURS]["launches"] <= row[THEIRS]["launches"], row


def test_an_operation_that_asks_for_a_value_would_be_seen() -> None:
    import torch

    with pytest.raises(RuntimeError):
        torch.empty(1, device="meta").item()
