"""Laws of the path over few tokens: the oracle's values and gradients, and nothing is passed by that must be called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from moslora import MoSLoRAConfig
from moslora.core import few_tokens, functional, ops
from tolerances import RELATIVE, SNR_DB, relative_error, snr_db

IN, OUT = 24, 20


def adapted(base: nn.Module | None = None, **settings: object) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Linear(IN, OUT) if base is None else base
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["0"], **settings}
    return get_peft_model(nn.Sequential(base), MoSLoRAConfig(**config)).eval()


def layer_of(model: PeftModel) -> Any:
    return model.base_model.model[0]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of entries with which the path was taken from here on."""
    taken: list[int] = []
    original = ops.by_few_operations

    def spy(x: torch.Tensor, *others: Any) -> torch.Tensor:
        taken.append(x.numel())
        return original(x, *others)

    monkeypatch.setattr(ops, "by_few_operations", spy)
    return taken


@contextlib.contextmanager
def without_it() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_tokens, "FEW", -1)
        yield


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5,), (2, 3), (30,), (2, 16), (0,), ()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_every_gradient_equal_the_oracle(
    dtype: torch.dtype, shape: tuple[int, ...], has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    sizes = [(*shape, IN), (OUT, IN), (OUT,), (4, IN), (4, 4), (OUT, 4)]
    x, weight, bias, A, M, B = (
        (torch.randn(size, generator=generator) / 3).to(dtype).requires_grad_() for size in sizes
    )
    out = ops.by_few_operations(x, weight, bias if has_bias else None, A, M, B, -1.5)
    inputs = [x, weight, A, M, B, *([bias] if has_bias else [])]
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = nn.functional.linear(wide[0], wide[1], wide[5] if has_bias else None)
    expected = expected + functional.low_rank_update(wide[0], *wide[2:5], -1.5)
    assert out.shape == expected.shape and out.dtype == dtype
    weights = torch.randn(out.shape, generator=generator).to(dtype)
    found = [out, *torch.autograd.grad((out * weights).sum(), inputs)]
    right = [expected, *torch.autograd.grad((expected * weights).sum(), wide)]
    for one, two in zip(found, right, strict=True):
        if not one.numel():
            continue
        if dtype == torch.bfloat16:
            assert snr_db(one, two) > SNR_DB[dtype]
        else:
            assert relative_error(one, two) < RELATIVE[dtype]


def test_its_gradients_can_be_differentiated_again() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (4, 5), (4,), (2, 5), (2, 2), (4, 2)]
    inputs = tuple(
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes
    )

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return ops.by_few_operations(*tensors, 0.7)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("train_mixer", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_plain_layer_takes_it_and_gives_what_the_function_gives(
    train_mixer: bool, training: bool, calls: list[int]
) -> None:
    model = adapted(train_mixer=train_mixer).train(training)
    x = torch.randn(2, 3, IN)
    factors = [p for p in model.parameters() if p.requires_grad]
    found = model(x)
    assert calls == [x.numel()]
    with without_it():
        expected = model(x)
    assert calls == [x.numel()] and relative_error(found, expected) < RELATIVE[torch.float32]
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), factors),
        torch.autograd.grad(expected.square().sum(), factors),
        strict=True,
    ):
        assert relative_error(one, two) < RELATIVE[torch.float32]
    model(torch.randn(few_tokens.FEW // IN + 1, IN))
    assert calls == [x.numel()]  # that many are for the Function


def doubling(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def put_forward(module: nn.Module) -> None:
    original = module.forward
    module.forward = lambda x: 2 * original(x)  # type: ignore[method-assign]


def two_active(model: PeftModel) -> None:
    config = MoSLoRAConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])


def another_elsewhere(model: PeftModel) -> None:
    """Only an adapter that this layer does not have is active."""
    layer_of(model)._active_adapter = ["elsewhere"]


# What is done to a layer after its first call.
CHANGES: dict[str, Callable[[PeftModel], object]] = {
    "a hook on the base layer": lambda m: layer_of(m).base_layer.register_forward_hook(doubling),
    "a hook before the base layer": lambda m: layer_of(m).base_layer.register_forward_pre_hook(
        lambda _, inputs: (2 * inputs[0],)
    ),
    "a forward of the base layer's own": lambda m: put_forward(layer_of(m).base_layer),
    "a hook on A": lambda m: layer_of(m).moslora_A["default"].register_forward_hook(doubling),
    "a forward of M's own": lambda m: put_forward(layer_of(m).moslora_M["default"]),
    "a backward hook on B": lambda m: layer_of(m).moslora_B["default"].register_full_backward_hook(
        lambda *_: None
    ),
    "another class of base layer": lambda m: setattr(
        layer_of(m), "base_layer", type("Other", (nn.Linear,), {"forward": lambda s, x: 3 * x[..., :OUT]})(IN, OUT)
    ),
    "two adapters": two_active,
    "an adapter that is not here": another_elsewhere,
    "disabled": lambda m: m.base_model.disable_adapter_layers(),
    "merged": lambda m: m.merge_adapter(),
    "factors of another dtype": lambda m: layer_of(m).moslora_A["default"].double(),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*(hook|adapter).*:UserWarning")
def test_what_comes_after_a_first_call_is_seen(change: str, calls: list[int]) -> None:
    model, x = adapted(), torch.randn(2, IN)
    before = model(x)
    assert len(calls) == 1
    CHANGES[change](model)
    found = model(x)
    assert len(calls) == 1, "the path was taken where it must not be"
    with without_it():
        assert torch.equal(found, model(x))
    if change not in ("merged", "factors of another dtype", "a backward hook on B"):
        assert relative_error(found, before) > 0.01


# What is plain, and may change between calls.
VALUES: dict[str, Callable[[PeftModel], object]] = {
    "the scale": lambda m: layer_of(m).set_scale("default", 5.0),
    "the weight": lambda m: setattr(layer_of(m).base_layer, "weight", nn.Parameter(torch.randn(OUT, IN))),
    "the data of a factor": lambda m: setattr(layer_of(m).moslora_B["default"].weight, "data", torch.ones(OUT, 4)),
    "the mixer": lambda m: layer_of(m).set_mixer("default", torch.eye(4)),
    "the bias": lambda m: setattr(layer_of(m).base_layer, "bias", None),
    "the dtype": lambda m: m.double(),
    "another adapter": lambda m: (two_active(m), m.set_adapter("other")),
}  # fmt: skip


@pytest.mark.parametrize("change", VALUES)
def test_values_that_change_between_calls_are_the_next_ones(change: str, calls: list[int]) -> None:
    model, x = adapted(), torch.randn(2, IN)
    before = model(x)
    VALUES[change](model)
    x = x.to(layer_of(model).base_layer.weight.dtype)
    found = model(x)
    assert len(calls) == 2
    with without_it():
        assert relative_error(found, model(x)) < RELATIVE[torch.float32]
    if change != "the dtype":
        assert relative_error(found, before) > 0.01


NOT_PLAIN: dict[str, dict[str, Any]] = {
    "a magnitude": {"use_dora": True},
    "a bias on B": {"lora_bias": True},
    "a start of the base's components": {"init_lora_weights": "pissa"},
    "Conv1D": {"base": Conv1D(OUT, IN)},
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_is_more_than_three_factors_goes_its_own_way(kind: str, calls: list[int]) -> None:
    model = adapted(**NOT_PLAIN[kind])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moslora_B" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, IN)
    found = model(x)
    with without_it():
        assert not calls and torch.equal(found, model(x))


def test_dropout_is_drawn_in_training_and_only_then(calls: list[int]) -> None:
    model, x = adapted(lora_dropout=0.5), torch.randn(2, IN)
    model(x)
    assert len(calls) == 1
    model.train()
    assert not torch.equal(model(x), model(x)) and len(calls) == 1


def test_autocast_transforms_switches_and_graphs_go_their_own_way(
    calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(), torch.randn(2, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    with ops.fusing(False):
        model(x)
    torch.func.vmap(layer_of(model))(x)
    torch.func.grad(lambda v: layer_of(model)(v).sum())(x)
    assert not ops.is_for_few_operations(x.as_subclass(type("Mine", (torch.Tensor,), {})))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not ops.is_for_few_operations(x)
    assert not calls


def test_a_mixer_that_is_trained_in_16_bits_is_split_first(calls: list[int]) -> None:
    model = adapted().to(torch.bfloat16)
    x = torch.randn(2, IN, dtype=torch.bfloat16)
    model(x)
    layer = layer_of(model)
    assert layer.mixer_start.get("default") is not None and not calls


def test_another_call_has_no_extra_arguments_lost(calls: list[int]) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, by: float = 1.0) -> torch.Tensor:
            return by * super().forward(x)

    model = adapted(Scaled(IN, OUT))
    x = torch.randn(2, IN)
    assert relative_error(layer_of(model)(x, by=3.0), layer_of(model)(x)) > 0.1 and not calls
