"""Batch sizes that follow a GPU's free memory, and losses where it does not suffice, on a GPU that is played."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import tiny
from moslora.batching import FILLED, FIRST, BatchSize
from moslora.data.tokenization import Encoded
from moslora.tasks.text.loss import GPU_LOSS_TOKENS, LOSS_TOKENS, example_losses, text_batches


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


# ---- the loss of examples --------------------------------------------------------------------------------


def narrow(rows: int) -> tuple[LlamaForCausalLM, list[int]]:
    """Return a model that runs out of memory above so many rows, and a list of how many it took each time."""
    model, seen = tiny.llama(), []

    def refuse(_: object, __: object, arguments: dict[str, torch.Tensor]) -> None:
        if len(arguments["input_ids"]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(len(arguments["input_ids"]))

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model, seen


def examples_of(*lengths: int) -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(64, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(row, [-100, *row[1:]], [], "", False, "", len(row), False, False) for row in rows]


def test_a_gpu_takes_more_tokens_at_once() -> None:
    examples = examples_of(*[64] * 200)
    assert {len(numbers) * 64 for numbers, _ in text_batches(examples, 0)} == {
        LOSS_TOKENS,
        200 * 64 % LOSS_TOKENS,
    }
    assert max(len(numbers) for numbers, _ in text_batches(examples, 0, "cuda:1")) * 64 == GPU_LOSS_TOKENS


@pytest.mark.parametrize("fits", [1, 2, 3, 7])
def test_losses_are_the_same_where_memory_takes_a_part_of_a_batch(fits: int) -> None:
    examples = examples_of(3, 4, 5, 6, 7, 8, 9)
    (whole,) = example_losses(tiny.llama(), text_batches(examples, 0), "cpu")
    model, seen = narrow(fits)
    (parts,) = example_losses(model, text_batches(examples, 0), "cpu")
    assert max(seen) <= fits and sum(seen) == 7
    assert parts[0] == whole[0] and parts[2].tolist() == whole[2].tolist()
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-6, atol=0)


def test_a_row_that_does_not_fit_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(example_losses(narrow(0)[0], text_batches(examples_of(5), 0), "cpu"))


def test_what_cannot_be_cut_by_rows_is_told() -> None:
    ((numbers, tensors),) = text_batches(examples_of(5, 6), 0)
    with pytest.raises(torch.OutOfMemoryError):
        list(example_losses(narrow(1)[0], [(numbers, {**tensors, "pixels": torch.zeros(3)})], "cpu"))
