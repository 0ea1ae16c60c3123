"""Batch sizes that follow a GPU's free memory, on a GPU that is played."""

from __future__ import annotations

import pytest
import torch

from moslora.batching import FILLED, FIRST, BatchSize


class PlayedGPU:
    """So much memory, of which a batch takes so much per item."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, held: int, per_item: int) -> None:
        self.total, self.held, self.per_item, self.peak = total, held, per_item, held
        answers = {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.held),
            "memory_allocated": lambda device: self.held,
            "max_memory_allocated": lambda device: self.peak,
            "memory_reserved": lambda device: self.peak,
            "mem_get_info": lambda device: (self.total - self.peak, self.total),
            "empty_cache": lambda: None,
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def work(self, items: int) -> None:
        if self.held + items * self.per_item > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = max(self.peak, self.held + items * self.per_item)


def all_done(gpu: PlayedGPU, batch: BatchSize, items: int) -> list[int]:
    """Work on so many items, as the loops do that use it; return the sizes of the batches."""
    sizes: list[int] = []
    while sum(sizes) < items:
        count = min(batch.now, items - sum(sizes))
        try:
            with batch.measured(count):
                gpu.work(count)
        except Exception as error:
            if not batch.made_smaller(error):
                raise
            continue
        sizes.append(count)
    return sizes


def test_batches_grow_to_what_the_free_memory_takes(monkeypatch):
    gpu = PlayedGPU(monkeypatch, total=1000, held=200, per_item=10)
    sizes = all_done(gpu, BatchSize("cuda", 16, 64, lambda text: None), 400)
    assert sizes[:4] == [FIRST, 8, 16, 32]
    assert max(sizes) == int(FILLED * 800 / 10)
    assert sum(sizes) == 400


def test_batches_never_exceed_the_most(monkeypatch):
    gpu = PlayedGPU(monkeypatch, total=10**6, held=0, per_item=1)
    assert max(all_done(gpu, BatchSize("cuda:0", 16, 64, lambda text: None), 1000)) == 64


def test_a_batch_that_does_not_fit_is_halved_and_said_until_one_item_does_not_fit(monkeypatch):
    said: list[str] = []
    gpu = PlayedGPU(monkeypatch, total=300, held=200, per_item=60)
    assert all_done(gpu, BatchSize("cuda", 16, 64, said.append), 3) == [1, 1, 1]
    assert said[-1] == "Out of memory; continuing with 1 items at once."
    with pytest.raises(torch.OutOfMemoryError):
        all_done(PlayedGPU(monkeypatch, 300, 200, 101), BatchSize("cuda", 16, 64, said.append), 1)


def test_on_a_cpu_it_is_the_usual_number_whatever_happens():
    batch = BatchSize("cpu", 16, 64, lambda text: None)
    with batch.measured(16):
        pass
    assert batch.now == 16
    assert not batch.made_smaller(ValueError("no"))
