"""Checkpoints of the trainer, and whether their files are whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moslora.bounded import read_header

__all__ = ["Checkpoint", "checkpoint_faults", "engine_of", "processes_of"]

# The files that hold the optimizer's state, and what it needs beside the adapter.
STATES = {"plain": ("optimizer.pt",), "fsdp": ("optimizer.bin", "pytorch_model_fsdp.bin"), "zero": ()}


@dataclass(frozen=True)
class Checkpoint:
    """One ``checkpoint-N`` folder of transformers' ``Trainer``.

    Attributes:
        path: The folder.
        step: Optimiser steps done when it was written.
        faults: What keeps training from continuing here, in words; empty for a complete checkpoint.
    """

    path: Path
    step: int
    faults: tuple[str, ...] = ()


def checkpoint_faults(path: Path, step: int) -> Iterator[str]:
    """Yield what is wrong with the files of a checkpoint, without unpickling any of them.

    Args:
        path: The folder.
        step: The step in its name.
    """
    if (path / "checkpoint-is-incomplete.txt").exists():
        yield "it is marked as incomplete"
    # Several processes leave one random state each: rng_state_0.pth, rng_state_1.pth, …
    random_states = sorted(file.name for file in path.glob("rng_state*.pth")) or ["rng_state.pth"]
    engine = engine_of(path)
    if engine == "zero":
        yield from _zero_faults(path, len(random_states))
    for name in ("adapter_model.safetensors", *STATES[engine], "scheduler.pt", *random_states):
        file = path / name
        is_whole = _is_whole_safetensors if file.suffix == ".safetensors" else zipfile.is_zipfile
        if not file.is_file():
            yield f"{name} is missing"
        elif not is_whole(file):
            yield f"{name} is cut off"
    # The trainer writes this one last.
    state = path / "trainer_state.json"
    try:
        found = json.loads(state.read_bytes())["global_step"]
        if found != step:
            yield f"trainer_state.json is of step {found}"
    except FileNotFoundError:
        yield "trainer_state.json is missing"
    except (ValueError, KeyError, TypeError):
        yield "trainer_state.json is cut off"


def engine_of(path: Path) -> str:
    """Return what wrote a checkpoint's optimizer: ``fsdp``, ``zero``, or ``plain`` for one process and DDP.

    Args:
        path: The folder.
    """
    if any(path.glob("global_step*")):
        return "zero"
    return "fsdp" if any((path / name).exists() for name in STATES["fsdp"]) else "plain"


def processes_of(path: Path) -> int:
    """Return how many processes wrote a checkpoint: each leaves its random state.

    Args:
        path: The folder.
    """
    return max(1, len(list(path.glob("rng_state_*.pth"))))


def _zero_faults(path: Path, processes: int) -> Iterator[str]:
    """Yield what is missing of DeepSpeed's own folder, to which the file ``latest`` points."""
    try:
        folder = path / (path / "latest").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        yield "latest is missing"
        return
    found = [file for pattern in ("*model_states.pt", "*optim_states.pt") for file in folder.glob(pattern)]
    if len([file for file in found if file.name.endswith("optim_states.pt")]) < processes:
        yield f"{folder.name} has not the optimizer's state of each process"
    for file in found:
        if not zipfile.is_zipfile(file):
            yield f"{folder.name}/{file.name} is cut off"


def _is_whole_safetensors(file: Path) -> bool:
    try:
        read_header(file)
    except ValueError:
        return False
    return True
