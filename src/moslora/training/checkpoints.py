"""Checkpoints of the trainer, and whether their files are whole."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moslora.bounded import read_header

__all__ = ["Checkpoint", "checkpoint_faults"]


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
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", *random_states):
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


def _is_whole_safetensors(file: Path) -> bool:
    try:
        read_header(file)
    except ValueError:
        return False
    return True
