from __future__ import annotations

import pytest
import torch

from moslora.core.mixers import MIXERS, find_mixer, forked_generator, initial_mixer


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_is_square_float32_and_reproducible(name: str) -> None:
    first, second = (initial_mixer(name, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (8, 8) and first.dtype == torch.float32
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["kaiming", "orthogonal", "gaussian", "identity"])
def test_learned_mixers_start_with_full_rank(name: str) -> None:
    assert torch.linalg.matrix_rank(initial_mixer(name, 8, torch.Generator().manual_seed(0)).double()) == 8


def test_orthogonal_is_orthogonal() -> None:
    M = initial_mixer("orthogonal", 16).double()
    assert (M @ M.T - torch.eye(16)).abs().max() < 1e-5  # float32 QR, 16 columns


def test_kaiming_shrinks_what_it_mixes_by_the_root_of_three() -> None:
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(50):
        A = torch.randn(16, 64, generator=generator)
        ratios.append((initial_mixer("kaiming", 16, generator) @ A).norm() / A.norm())
    # uniform on ±1/sqrt(r) has variance 1/(3r); 50 draws of 256 entries leave about 1 % of spread
    assert abs(torch.stack(ratios).mean() - 3**-0.5) < 0.02


def test_a_mixer_that_cannot_learn_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"cannot learn.*every gradient.*zero.*identity"):
        find_mixer("zeros")


def test_an_unknown_mixer_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'orthogonal'"):
        find_mixer("ortogonal")


def test_forking_does_not_advance_the_generator_and_follows_it() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = initial_mixer("gaussian", 4, forked_generator())
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert not torch.equal(first, initial_mixer("gaussian", 4, forked_generator()))
