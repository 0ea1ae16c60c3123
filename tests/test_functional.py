from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moslora.core import functional
from tolerances import RELATIVE, relative_error

SIZES = st.integers(1, 9)
SEEDS = st.integers(0, 2**16)


def draw(
    seed: int, n_in: int, r: int, n_out: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, n_in), (r, n_in), (r, r), (n_out, r))
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)


@given(SEEDS, SIZES, SIZES, SIZES)
def test_update_is_x_times_the_delta_weight(seed: int, n_in: int, r: int, n_out: int) -> None:
    x, A, M, B = draw(seed, n_in, r, n_out)
    update = functional.low_rank_update(x, A, M, B, 0.7)
    size = functional.low_rank_update(x.abs(), A.abs(), M.abs(), B.abs(), 0.7)
    assert relative_error(update, x @ functional.delta_weight(A, M, B, 0.7).T, size) < RELATIVE[torch.float64]


@given(SEEDS, SIZES, SIZES, SIZES)
def test_identity_mixer_is_lora(seed: int, n_in: int, r: int, n_out: int) -> None:
    x, A, _, B = draw(seed, n_in, r, n_out)
    update = functional.low_rank_update(x, A, torch.eye(r, dtype=A.dtype), B, 2.0)
    size = x.abs() @ A.abs().T @ B.abs().T
    assert relative_error(update, 2.0 * (x @ A.T @ B.T), size) < RELATIVE[torch.float64]


@given(SEEDS, SIZES, SIZES, SIZES, st.sampled_from([torch.float32, torch.float64]))
def test_folding_keeps_the_delta_weight(seed: int, n_in: int, r: int, n_out: int, dtype: torch.dtype) -> None:
    _, A, M, B = draw(seed, n_in, r, n_out, dtype)
    folded = functional.fold(A, M)
    assert folded.dtype == dtype and folded.shape == A.shape
    eye = torch.eye(r, dtype=dtype)
    before, after = functional.delta_weight(A, M, B, 1.5), functional.delta_weight(folded, eye, B, 1.5)
    size = 1.5 * B.abs() @ M.abs() @ A.abs()
    assert relative_error(after, before, size) < RELATIVE[dtype]


@given(SEEDS, SIZES, st.integers(1, 4), SIZES)
def test_two_subspace_mixing_is_a_fixed_mixer(seed: int, n_in: int, half: int, n_out: int) -> None:
    x, A, _, B = draw(seed, n_in, 2 * half, n_out)
    mixer = functional.two_subspace_mixer(2 * half, torch.float64)
    explicit = functional.two_subspace_update(x, A, B, 0.5)
    assert (
        relative_error(functional.low_rank_update(x, A, mixer, B, 0.5), explicit)
        < 10 * RELATIVE[torch.float64]
    )
    assert torch.linalg.matrix_rank(mixer) == half


def test_scaling_is_alpha_over_r_or_its_root() -> None:
    assert functional.scaling(32, 16) == 2
    assert functional.scaling(32, 16, use_rslora=True) == 8
    with pytest.raises(ValueError, match="r=0 is not a rank"):
        functional.scaling(1, 0)


@pytest.mark.parametrize(
    "shapes", [((4, 5), (3, 3), (6, 4)), ((4, 5), (4, 4), (6, 3)), ((4,), (4, 4), (6, 4))]
)
def test_factors_that_do_not_fit_are_named_with_their_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    A, M, B = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"found A \(.*M \(.*B \("):
        functional.delta_weight(A, M, B, 1.0)


def test_wrong_inputs_are_refused() -> None:
    A, M, B = torch.zeros(4, 5), torch.zeros(4, 4), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="7 features"):
        functional.low_rank_update(torch.zeros(2, 7), A, M, B, 1.0)
    with pytest.raises(ValueError, match="even r"):
        functional.two_subspace_update(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(6, 3), 1.0)
    with pytest.raises(ValueError, match="r=3"):
        functional.two_subspace_mixer(3)
    with pytest.raises(ValueError, match="Cannot fold"):
        functional.fold(A, torch.zeros(3, 3))
