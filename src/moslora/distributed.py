"""Several processes that train one adapter together, as torchrun and accelerate launch start them.

Each has the whole model and its own rows of every batch, and gradients are averaged (DDP). All else is done once: the
first process measures, keeps, proves and reports, and the others wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeVar

from moslora.compat.accelerate import leave_launcher
from moslora.errors import UsageError

__all__ = ["Team", "environment_alone", "in_main_process", "launched", "refuse_sharding"]

# What the first process does alone, as measuring a large model, may take days; whoever launched ends those left behind.
PATIENCE = timedelta(days=30)
# How a launcher tells a process its place.
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")


def launched() -> int:
    """Return how many processes a launcher has started to work together; 1 if none has."""
    if "RANK" not in os.environ:
        return 1
    return int(os.environ.get("WORLD_SIZE", "1"))


def in_main_process() -> bool:
    """Return whether this process is the first of those launched, or alone."""
    return launched() == 1 or os.environ["RANK"] == "0"


def environment_alone() -> dict[str, str]:
    """Return this process's environment without its place among others, for a process that is to be alone."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in PLACE and not name.startswith("TORCHELASTIC_")
    }


def refuse_sharding(trainer: Mapping[str, Any]) -> None:
    """Refuse to spread a model over processes, which a run's measurements and proofs do not know.

    Args:
        trainer: The recipe's section.

    Raises:
        ValueError: If the recipe, or what launched this process, asks for FSDP or DeepSpeed.
    """
    asked = [f"trainer.{name}" for name in ("fsdp", "deepspeed") if trainer.get(name)]
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            asked.append(f"accelerate's configuration, which asks for {name},")
    if asked:
        raise UsageError(
            f"{asked[0]} spreads a model over processes, and what a run measures and proves takes a whole one. Each "
            "process of a run holds the model: leave it out, quantize the base if it is too large, or "
            "train in a script of PEFT's with MoSLoRAConfig, where DDP, FSDP and FSDP2 are tested."
        )


class Team:
    """The processes of a run; one alone where no launcher has started several.

    Args:
        rank: Which one this is.
        size: How many there are.
        group: Of torch.distributed, on the CPU, for words between them.
        made: Whether torch.distributed was started for this, and ends with it.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None, made: bool = False) -> None:
        self.rank, self.size, self._group, self._made = rank, size, group, made

    @classmethod
    def join(cls, trainer: Mapping[str, Any] | None = None) -> Team:
        """Meet the other processes; each takes the GPU that its launcher gave it.

        Args:
            trainer: The recipe's section, of which ``ddp_backend`` and ``ddp_timeout`` (seconds) count.
        """
        if launched() == 1:
            return cls()
        trainer = trainer or {}
        import torch
        from torch import distributed
        from transformers import TrainingArguments

        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        made = not distributed.is_initialized()
        if made:
            backend = trainer.get("ddp_backend") or ("nccl" if torch.cuda.is_available() else "gloo")
            seconds = trainer.get("ddp_timeout", TrainingArguments.ddp_timeout)
            distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size(), group, made)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that does all that is done once."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """Return what the first process gave here.

        Args:
            value: The first's; of the others it does not matter.
        """
        if self.size == 1:
            return value
        from torch import distributed

        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def maximum(self, number: int) -> int:
        """Return the largest number that any process gave here.

        Args:
            number: This one's.
        """
        if self.size == 1:
            return number
        import torch
        from torch import distributed

        found = torch.tensor(number)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self._group)
        return int(found)

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.maximum(0)

    def shut_down(self) -> None:
        """Part, once all are here: from now on each process is one alone, to itself and to those that it starts."""
        if self.size == 1:
            return
        from torch import distributed

        self.wait()
        if not self._made:
            return
        distributed.destroy_process_group()
        leave_launcher(os.environ.keys() - environment_alone().keys())
