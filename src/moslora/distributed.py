"""Several processes that train one adapter together, as torchrun and accelerate launch start them.

Each has its own rows of every batch, and gradients are averaged. The model is whole in each of them (DDP), or each has
a part of it (``recipe/parallel.py``). What is measured is shared out, too. The first process keeps, proves and reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moslora.compat.accelerate import leave_launcher

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Team",
    "environment_alone",
    "in_main_process",
    "is_split",
    "launched",
    "no_gradients",
]

# What the first process does alone, as measuring a large model, may take days; whoever launched ends those left behind.
PATIENCE = timedelta(days=30)
# How a launcher tells a process its place.
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")

T = TypeVar("T")
R = TypeVar("R")


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


def is_split(model: nn.Module) -> bool:
    """Tell whether each process holds a part of a model, which is gathered where the model itself is called.

    Args:
        model: As the trainer has it.
    """
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or hasattr(next(model.parameters(), None), "ds_id")


def no_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which a model is measured: ``torch.inference_mode``, where it can be.

    What a split model gathers is used again in training, which does not take tensors of ``inference_mode``.

    Args:
        model: As the trainer has it.
    """
    import torch

    return torch.no_grad() if is_split(model) else torch.inference_mode()


class Team:
    """The processes of a run; one alone where no launcher has started several.

    Args:
        rank: Which one this is.
        size: How many there are.
        group: Of torch.distributed, on the CPU, for words between them.
        made: Whether torch.distributed was started for this, and ends with it.
        in_step: Whether each holds a part of the model, so that all must run it equally often.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, group: Any = None, made: bool = False, in_step: bool = False
    ) -> None:
        self.rank, self.size, self._group, self._made, self.in_step = rank, size, group, made, in_step

    @classmethod
    def join(cls, trainer: Mapping[str, Any] | None = None, is_sharded: bool = False) -> Team:
        """Meet the other processes; each takes the GPU that its launcher gave it.

        Args:
            trainer: The recipe's section, of which ``ddp_backend`` and ``ddp_timeout`` (seconds) count.
            is_sharded: Whether each will hold a part of the model.
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
            on_gpus = "cpu:gloo,cuda:nccl" if is_sharded else "nccl"
            backend = trainer.get("ddp_backend") or (on_gpus if torch.cuda.is_available() else "gloo")
            seconds = trainer.get("ddp_timeout", TrainingArguments.ddp_timeout)
            distributed.init_process_group(backend, timeout=timedelta(seconds=seconds))
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size(), group, made, is_sharded)

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

    def gather(self, value: T) -> list[T]:
        """Return what each process gave here, in their order, in all of them.

        Args:
            value: This one's; it is pickled.
        """
        if self.size == 1:
            return [value]
        from torch import distributed

        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self._group)
        return found

    def share(
        self,
        items: Iterable[T],
        work: Callable[[T], R],
        done: Callable[[Sequence[T], R | None], None],
    ) -> list[R]:
        """Work on items, each process on its share of them.

        Where each holds a part of the model, all call ``work`` equally often: who has no item left works on another's,
        and throws the result away.

        Args:
            items: The same in every process.
            work: Called with one item; its result is pickled where there are several processes.
            done: Called with as many items as there are processes, and this one's result, which is None where no item
                was left for it; all processes call it equally often, so that it may ask whether to stop.

        Returns:
            The results in the order of the items, in every process.
        """
        items = items if self.size == 1 else list(items)
        own: dict[int, R] = {}
        for start, chosen in enumerate(_in_groups(items, self.size)):
            result = None
            if self.rank < len(chosen):
                result = own[start * self.size + self.rank] = work(chosen[self.rank])
            elif self.in_step:
                work(chosen[0])
            done(chosen, result)
        everyones = {number: result for part in self.gather(own) for number, result in part.items()}
        return [everyones[number] for number in range(len(everyones))]

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


def _in_groups(items: Iterable[T], size: int) -> Iterable[Sequence[T]]:
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
