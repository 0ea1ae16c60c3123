"""State that accelerate shares between all its users in a process. Seen in accelerate 1.12 to 1.15.

This file imports nothing at import time, so that every floor may use it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["accumulation_state", "leave_launcher", "set_accumulation_state", "shard_on_cpus"]


def accumulation_state() -> dict[str, Any]:
    """Return a copy of the gradient accumulation state, which accelerate keeps once per process.

    - Private: ``GradientState._shared_state``, seen in accelerate 1.12 to 1.15.
    - Without it: of several trainings in one process, each would see how far the others have accumulated.
    - Can go: when accelerate keeps this state per ``Accelerator``.
    """
    from accelerate.state import GradientState

    return dict(GradientState._shared_state)


def set_accumulation_state(state: Mapping[str, Any]) -> None:
    """Replace the gradient accumulation state by one that ``accumulation_state`` returned.

    - Private: ``GradientState._shared_state``, seen in accelerate 1.12 to 1.15; see ``accumulation_state``.

    Args:
        state: The state to set.
    """
    from accelerate.state import GradientState

    GradientState._shared_state.clear()
    GradientState._shared_state.update(state)


def shard_on_cpus() -> None:
    """Let processes without a GPU shard a model by FSDP, too; others are left alone.

    - Private: ``PartialState._shared_state``, seen in accelerate 1.12 to 1.15. It stays changed by intention, until
      ``leave_launcher``.
    - Without it: accelerate passes over FSDP on CPUs in silence, and each process trains the whole model.
    - Can go: when accelerate shards on CPUs, which torch does.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def leave_launcher(variables: Iterable[str]) -> None:
    """Make this process one of its own, for good: without a launcher's variables and accelerate's memory of them.

    - Private: ``AcceleratorState._reset_state``, seen in accelerate 1.12 to 1.15. It stays changed by
      intention: the group of processes has ended.
    - Without it: what runs after training, and every process that it starts, would wait for the others.
    - Can go: when accelerate can end a distributed state.

    Args:
        variables: Names of environment variables to remove.
    """
    from accelerate.state import AcceleratorState

    for name in variables:
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
