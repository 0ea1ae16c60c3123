"""Whether entries are finite, and whether ΔW is zero, told by less than all of it."""

from __future__ import annotations

import math

import pytest
import torch

from moslora.adapters.factors import Factors
from moslora.core.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 100, 70_001])
def test_one_entry_that_is_not_finite_is_found(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
    assert all_finite(tensor)
    for place in {0, size // 2, size - 1}:
        for value in (math.nan, math.inf, -math.inf):
            broken = tensor.clone()
            broken[place] = value
            assert not all_finite(broken)
            assert not all_finite(broken[None].T)


def test_other_dtypes_and_nothing_at_all() -> None:
    assert all_finite(torch.empty(0))
    assert all_finite(torch.arange(5))
    assert all_finite(torch.ones(2, dtype=torch.float8_e4m3fn).float())
    assert not all_finite(torch.tensor([1 + 1j, complex(math.inf, 0)]))


def factors(A: torch.Tensor, M: torch.Tensor, B: torch.Tensor, scale: float = 2.0) -> Factors:
    return Factors(A=A, M=M, B=B, scale=scale)


def test_zero_is_what_the_norm_calls_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    A, M, B = (torch.randn(*shape, generator=generator) for shape in ((4, 30), (4, 4), (20, 4)))
    apart = torch.zeros(20, 4)
    apart[7, 3] = 1.0
    nothing_there = M.clone()
    nothing_there[3] = 0
    broken = A.clone()
    broken[0, 0] = math.nan
    for given, zero in [
        (factors(A, M, B), False),
        (factors(A, M, B * 1e-30), False),
        (factors(A, M, torch.zeros_like(B)), True),
        (factors(torch.zeros_like(A), M, B), True),
        (factors(A, torch.zeros_like(M), B), True),
        (factors(A, M, B, 0.0), True),
        (factors(A, M, apart), False),
        (factors(A, nothing_there, apart), True),
        (factors(broken, M, B), False),
        (factors(broken, M, torch.zeros_like(B)), False),
    ]:
        assert given.is_zero() is zero is (given.norm() == 0)


def test_a_row_that_is_zero_does_not_stand_for_all() -> None:
    A = torch.zeros(2, 6)
    A[1] = 1.0
    B = torch.tensor([[9.0, 0.0], [0.0, 1.0]])  # the largest entry meets the row of zeros
    assert not factors(A, torch.eye(2), B).is_zero()
