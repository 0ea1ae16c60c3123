"""How many items are worked on at once: as many as a GPU's free memory takes, found while working."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["BatchSize"]

# On a GPU the first batch is small, because nothing is known yet; its peak of memory tells what an item takes.
FIRST = 4
# Share of the free memory that is filled: items differ, and the allocator leaves gaps.
FILLED = 0.7


class BatchSize:
    """The number of items that are worked on at once.

    On a GPU it starts small and follows the memory that an item was seen to take, up to ``most``; where memory does not
    suffice after all it is halved, and stays at or below that. Elsewhere it is ``usual``.

    Args:
        device: Where the model is.
        usual: Items at once on a CPU.
        most: Items at once on a GPU, however much memory is free.
        say: Receives a sentence when a batch did not fit.

    Attributes:
        now: How many items the next batch takes.
    """

    def __init__(self, device: str, usual: int, most: int, say: Callable[[str], None]) -> None:
        self.on_gpu = device.startswith("cuda")
        self.device, self.most, self.say = device, most, say
        self.now = min(FIRST, most) if self.on_gpu else usual

    @contextmanager
    def measured(self, items: int) -> Iterator[None]:
        """Work on a batch, and set the next batch's size by the memory that this one took.

        Args:
            items: How many items the batch has.
        """
        if not self.on_gpu:
            yield
            return
        import torch

        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        taken = torch.cuda.max_memory_allocated(self.device) - before
        # What the allocator holds and does not use is free for it, too.
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + held
        fitting = int(FILLED * free * items / taken) if taken > 0 else self.most
        self.now = max(1, min(self.most, fitting, 2 * max(items, self.now)))

    def made_smaller(self, error: Exception) -> bool:
        """Halve the number if an error says that a GPU's memory does not suffice.

        Args:
            error: What a batch raised.

        Returns:
            Whether to try again with ``now`` items.
        """
        import torch

        if not isinstance(error, torch.OutOfMemoryError) or self.now == 1:
            return False
        self.now = self.most = self.now // 2
        torch.cuda.empty_cache()
        self.say(f"Out of memory; continuing with {self.now} items at once.")
        return True
