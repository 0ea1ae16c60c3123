"""What do principal components of a weight cost, and how close are they?

A layer's weight, once with a spectrum that falls as trained weights' do and once of random numbers, is decomposed by
the start of ``init_lora_weights="pissa"`` here, by torch's whole SVD (PEFT's ``"pissa"``) and by ``torch.svd_lowrank``
with 4 and 16 iterations (PEFT's ``"pissa_niter_N"``), interleaved in random order, in several processes. The error
is that of the rank-r part, ``‖U·Σ·Vᵀ - W_r‖_F / ‖W_r‖_F``, W_r being the whole decomposition's; and what of W is
left, over the least that can be.

    python benchmarks/principal.py [--size N] [--rank R] [--rounds N] [--processes N] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, interleave, over

from moslora.core.principal import principal_components
from moslora.files import write_text

WHOLE = "torch.linalg.svd"
POWER = 0.5  # of a falling spectrum: the k-th value is k to the minus this


def weights(size: int) -> dict[str, torch.Tensor]:
    """Make the two weights."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
    falling = torch.arange(1, size + 1).float() ** -POWER
    return {"falling spectrum": (left * falling) @ right.T, "random": torch.randn(size, size) / size**0.5}


def measure(size: int, rank: int, rounds: int) -> dict[str, Any]:
    """Measure in one process."""
    found: dict[str, Any] = {}
    for name, weight in weights(size).items():
        results: dict[str, tuple[torch.Tensor, ...]] = {}

        def by_lowrank(iterations: int, weight: torch.Tensor = weight) -> tuple[torch.Tensor, ...]:
            U, values, V = torch.svd_lowrank(weight, rank, niter=iterations)
            return U, values, V.T

        ways = {
            "moslora": lambda weight=weight: principal_components(weight, rank),
            "svd_lowrank, 4": lambda: by_lowrank(4),
            "svd_lowrank, 16": lambda: by_lowrank(16),
            WHOLE: lambda weight=weight: torch.linalg.svd(weight, full_matrices=False),
        }

        def kept(way: str, ways: Any = ways, results: Any = results) -> None:
            results[way] = ways[way]()

        times = interleave({way: lambda way=way: kept(way) for way in ways}, rounds, "cpu")
        U, values, Vh = (part.double() for part in results[WHOLE])
        leading, rest = (U[:, :rank] * values[:rank]) @ Vh[:rank], float(values[rank:].norm())
        row: dict[str, Any] = {}
        for way, result in results.items():
            one = (result[0][:, :rank].double() * result[1][:rank].double()) @ result[2][:rank].double()
            row[way] = {
                **over(times[way], times["moslora"]),
                "error": float((one - leading).norm() / leading.norm()),
                "left_over_least": float((weight.double() - one).norm()) / rest,
                **({"residual": result[3]} if way == "moslora" else {}),
            }
        found[name] = row
    return found


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "principal-cpu.json")
    wanted = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    processes = []
    for number in range(wanted.processes):
        with context.Pool(1) as pool:
            processes.append(pool.apply(measure, (wanted.size, wanted.rank, wanted.rounds)))
        for name, row in processes[-1].items():
            for way, one in row.items():
                print(
                    f"{number} {name:<17} {way:<17} {one['median_seconds']:7.2f} s  error {one['error']:.0e}",
                    flush=True,
                )
    from moslora.training.provenance import collect_hardware, collect_versions

    record = {
        "question": (__doc__ or "").splitlines()[0],
        "size": wanted.size,
        "rank": wanted.rank,
        "rounds": wanted.rounds,
        "processes": processes,
        "hardware": collect_hardware(),
        "versions": collect_versions(),
    }
    write_text(wanted.out, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
