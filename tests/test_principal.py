"""Principal components by few products: the triples of the whole decomposition, and an error that is measured."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from moslora import MoSLoRAConfig
from moslora.core import principal
from moslora.core.principal import ALLOWED, principal_components

SIDES = (400, 520)
R = 8


def weight_of(values: Tensor, shape: tuple[int, int] = SIDES) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=torch.float64)).Q
        for n in shape
    )
    return ((left * values.double()) @ right.T).float()


def falling(power: float, count: int = 400) -> Tensor:
    return torch.arange(1, count + 1) ** -power


WEIGHTS = {
    "falling": weight_of(falling(0.7)),
    "slowly": weight_of(falling(0.3)),
    "tall": weight_of(falling(0.5), SIDES[::-1]),
    "random": torch.randn(*SIDES, generator=torch.Generator().manual_seed(2)),
    "of rank 20": weight_of(falling(0.2, 20)),
    "equal in pairs": weight_of(falling(0.5, 200).repeat_interleave(2)),
}


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_the_components_are_those_of_the_whole_decomposition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = WEIGHTS[name]
    whole = torch.linalg.svd(weight.double(), full_matrices=False)
    monkeypatch.setattr(torch.linalg, "svd", None)  # it is not asked for
    U, values, Vh, error = principal_components(weight, R)
    assert 0 < error <= ALLOWED
    norm = float(whole.S[:R].norm())
    assert float((values.double() - whole.S[:R]).norm()) <= 2 * ALLOWED * norm
    for vectors in (U.T, Vh):
        assert float((vectors @ vectors.T - torch.eye(R)).abs().max()) < 1e-5
    found = float((weight.double() - (U * values).double() @ Vh.double()).square().sum())
    best = float(whole.S[R:].square().sum())
    assert found <= best * (1 + 1e-6) + (ALLOWED * norm) ** 2
    measured = float((weight @ Vh.T - U * values).norm()) / norm
    assert measured == pytest.approx(error, rel=0.2)


def test_the_result_depends_on_the_weight_alone() -> None:
    weight = WEIGHTS["falling"]
    torch.manual_seed(1)
    state, one = torch.get_rng_state(), principal_components(weight, R)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one[:3], principal_components(weight, R)[:3], strict=True))


@pytest.mark.parametrize(
    "weight", [torch.zeros(SIDES), weight_of(falling(0.2, 4))], ids=["of zeros", "of a rank below r"]
)
def test_where_the_error_is_not_small_the_whole_decomposition_is_taken(weight: Tensor) -> None:
    U, values, Vh, error = principal_components(weight, R)
    assert error == 0.0
    assert torch.isfinite(U).all() and torch.isfinite(Vh).all()
    assert float(((U * values) @ Vh - weight).norm()) <= 1e-5 * max(1.0, float(weight.norm()))


def test_a_start_says_how_close_it_is(caplog: pytest.LogCaptureFixture) -> None:
    weight = WEIGHTS["falling"]
    linear = nn.Linear(SIDES[1], SIDES[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    config = MoSLoRAConfig(r=R, init_lora_weights="pissa", target_modules=["0"])
    with caplog.at_level(logging.INFO, logger="moslora"):
        model = get_peft_model(nn.Sequential(linear), config)
    (said,) = [record.getMessage() for record in caplog.records if "Krylov" in record.getMessage()]
    layer = model.base_model.model[0]
    error = layer.component_errors["default"]
    assert 0 < error <= ALLOWED and f"{error:.0e} of their norm" in said
    assert not layer.get_delta_weight("default").any()
    U, values, Vh, _ = principal_components(weight, R)
    A, M, B = layer.held_factors("default")
    for held, expected in ((A, Vh), (M, torch.diag(values / layer.scaling["default"])), (B, U)):
        assert torch.equal(held, expected)
    layer.delete_adapter("default")
    assert "default" not in layer.component_errors


def test_a_small_weight_is_decomposed_whole() -> None:
    assert principal_components(torch.randn(100, 100), R)[3] == 0.0
    assert principal.LEAST * (R + principal.SPARE) > 100
