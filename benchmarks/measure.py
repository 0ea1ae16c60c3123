"""What the benchmarks share: interleaved timing, bytes kept for backward, and the head of every result.

A script finds this file because Python puts a script's own folder first among the places it imports from.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moslora.files import write_text
from moslora.training.provenance import collect_hardware, collect_versions

RESULTS = Path(__file__).parent / "results"
SEED = 0


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, clock: Callable[[], float] = time.perf_counter) -> float:
    """Time one call: with events on a GPU, with ``clock`` elsewhere."""
    if device.startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = clock()
    work()
    return clock() - started


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    say: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time all contenders round by round, each round in a random order; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(SEED)
    for index in range(rounds + 1):
        for name in order.sample(sorted(contenders), len(contenders)):
            spent = seconds(contenders[name], device, clock)
            if index:
                times[name].append(spent)
        say(f"round {index}/{rounds}")
    return times


def over(spent: list[float], floor: list[float]) -> dict[str, Any]:
    """Summarise times against the floor's of the same rounds, so that a slow minute hits both."""
    ratios = [a / b for a, b in zip(spent, floor, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {
        "median_seconds": statistics.median(spent),
        "over_floor": statistics.median(ratios),
        "quartiles": [round(q, 4) for q in quartiles],
    }


def saved_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Return the bytes that one forward keeps for backward, parameters and the trained input left out.

    Masks, positions and what a Function keeps of its own have no gradient, and are counted like all the rest.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor if tensor._base is None else tensor._base
        is_given = isinstance(owner, torch.nn.Parameter) or (owner.is_leaf and owner.requires_grad)
        if not is_given:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in storages.values())


def place(script: str, device: str) -> Path:
    """Return where a script's result goes: named by the kind of device, on a GPU by the GPU."""
    if device.startswith("cuda"):
        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return RESULTS / f"{script}-{device}.json"


def header(question: str, device: str, **settings: Any) -> dict[str, Any]:
    """Return what every result says first."""
    return {
        "question": question,
        **settings,
        "device": device,
        "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU",
        "seed": SEED,
        "versions": collect_versions(),
        "hardware": collect_hardware(),
    }


def write(result: dict[str, Any], out: Path, say: bool = True) -> None:
    """Write a result, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(result, indent=2) + "\n")
    if say:
        print(f"Wrote {out}")
