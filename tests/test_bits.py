"""Whether weights are what they were: any change of any bit is seen."""

from __future__ import annotations

import pytest
import torch

from moslora.models import bits
from moslora.models.bits import sums_of_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool]


def drawn(size: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (size,), generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, 8, 1000, 5003])
def test_one_bit_is_seen_wherever_it_is(
    dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "WORDS", 64)
    tensor = drawn(size, dtype)
    before = sums_of_bits({"w": tensor})
    assert sums_of_bits({"w": tensor.clone()}) == before
    octets = tensor.view(torch.uint8)
    for place in {0, len(octets) // 3, len(octets) - 1}:
        octets[place] ^= 1
        assert sums_of_bits({"w": tensor}) != before
        octets[place] ^= 1
    assert sums_of_bits({"w": tensor}) == before


def test_an_exchange_is_seen_within_a_piece_and_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits, "WORDS", 16)
    words = torch.arange(100, dtype=torch.int64)
    before = sums_of_bits({"w": words})
    for one, other in ((3, 5), (3, 19), (0, 99)):
        exchanged = words.clone()
        exchanged[[one, other]] = words[[other, one]]
        assert sums_of_bits({"w": exchanged}) != before


def test_names_shapes_signs_of_zero_and_views() -> None:
    tensor = torch.zeros(6, 4)
    of = sums_of_bits
    assert of({"a": tensor}) != of({"b": tensor})
    assert of({"a": tensor}) != of({"a": tensor.view(4, 6)})
    assert of({"a": tensor}) != of({"a": -tensor})
    base = torch.arange(100, dtype=torch.float32)
    assert of({"a": base[1:8]}) == of({"a": base[1:8].clone()})
    assert of({"a": base.view(10, 10).T}) == of({"a": base.view(10, 10).T.contiguous()})
    assert of({}) == []
    assert of({"a": torch.tensor(3.0), "b": torch.empty(0)})[1][3:] == (0, 0)
