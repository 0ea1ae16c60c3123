from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from moslora.core import functional, ops
from tolerances import MODEL, RELATIVE, SNR_DB, relative_error, snr_db

NAMES = ("x", "weight", "bias", "A", "M", "B")


def draw(
    seed: int = 0, batch: tuple[int, ...] = (2, 3), n_in: int = 5, r: int = 4, n_out: int = 7,
    dtype: torch.dtype = torch.float64,
) -> list[torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    shapes = ((*batch, n_in), (n_out, n_in), (n_out,), (r, n_in), (r, r), (n_out, r))
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def oracle(x, weight, bias, A, M, B, scale):  # type: ignore[no-untyped-def]
    return F.linear(x, weight, bias) + functional.low_rank_update(x, A, M, B, scale)


def gradients(function, inputs, positive=False):  # type: ignore[no-untyped-def]
    out = function(*inputs, 0.7)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, inputs, cotangent.abs() if positive else cotangent)]


@given(
    st.integers(0, 2**16), st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_value_and_every_gradient_equal_the_oracle(seed, batch, n_in, r, n_out, dtype) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(seed, batch, n_in, r, n_out, dtype)
    sizes = gradients(oracle, [t.detach().abs().requires_grad_() for t in inputs], positive=True)
    found, expected = gradients(ops.adapted_linear, inputs), gradients(oracle, inputs)
    for name, one, two, size in zip(("out", *NAMES), found, expected, sizes, strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        if two.numel():
            assert relative_error(one, two, size) < RELATIVE[dtype], name


def test_update_alone_equals_the_oracle() -> None:
    x, _, _, A, M, B = draw()
    found, expected = (f.low_rank_update(x, A, M, B, 0.7) for f in (ops, functional))
    assert relative_error(found, expected) < RELATIVE[torch.float64]


@pytest.mark.parametrize("batch", [(2, 3), (2, 2)])  # of 5 features
def test_gradcheck_and_gradgradcheck(batch: tuple[int, ...]) -> None:
    inputs = draw(batch=batch)
    assert torch.autograd.gradcheck(lambda *a: ops.adapted_linear(*a, 0.7), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ops.adapted_linear(*a, 0.7), inputs)
    x, _, _, A, M, B = inputs
    assert torch.autograd.gradgradcheck(lambda *a: ops.low_rank_update(*a, 0.7), (x, A, M, B))


@pytest.mark.parametrize("wanted", [("A",), ("M",), ("B",), ("x",), ("A", "B"), ("bias",)])
def test_only_what_is_asked_for_gets_a_gradient(wanted: tuple[str, ...]) -> None:
    inputs = [t.detach().requires_grad_(n in wanted) for n, t in zip(NAMES, draw(), strict=True)]
    ops.adapted_linear(*inputs, 0.7).sum().backward()
    assert {n for n, t in zip(NAMES, inputs, strict=True) if t.grad is not None} == set(wanted)


# Of 64 features: tokens enough to compose M into A, few enough to apply it between two products, and one.
COMPOSED_AND_CHAINED = [(4, 32), (4, 8), (1,)]


@pytest.mark.parametrize("batch", COMPOSED_AND_CHAINED)
@pytest.mark.parametrize("factors", [torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_not_wrong(
    dtype: torch.dtype, factors: torch.dtype | None, batch: tuple[int, ...]
) -> None:
    truth = draw(1, batch, 64, 8, 48)
    low = [
        t.detach().to(dtype if n in ("x", "weight", "bias") else factors or dtype).requires_grad_()
        for n, t in zip(NAMES, truth, strict=True)
    ]
    exact = [t.detach().double().requires_grad_() for t in low]  # the same rounded inputs, summed exactly
    out = ops.adapted_linear(*low, 0.7)
    assert out.dtype == dtype
    assert snr_db(out, oracle(*exact, 0.7)) > SNR_DB[dtype]
    cotangent = torch.randn(*batch, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = torch.autograd.grad(ops.adapted_linear(*low, 0.7), low, cotangent)
    expected = torch.autograd.grad(oracle(*exact, 0.7), exact, cotangent.double())
    for name, one, two in zip(NAMES, found, expected, strict=True):
        assert snr_db(one, two) > SNR_DB[dtype], name


@pytest.mark.parametrize("batch", COMPOSED_AND_CHAINED)
def test_autocast_runs_in_its_dtype_and_mixes_in_the_factors(batch: tuple[int, ...]) -> None:
    inputs = [t.detach().float().requires_grad_() for t in draw(1, batch, 64, 8, 48)]
    cotangent = torch.randn(*batch, 48, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.adapted_linear(*inputs, 0.7)
    assert out.dtype == torch.bfloat16
    expected = oracle(*inputs, 0.7)
    assert snr_db(out, expected) > SNR_DB[torch.bfloat16]
    found = torch.autograd.grad(out.float(), inputs, cotangent)
    for name, one, two in zip(NAMES, found, torch.autograd.grad(expected, inputs, cotangent), strict=True):
        assert one.dtype == torch.float32
        assert snr_db(one, two) > SNR_DB[torch.bfloat16], name


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6), st.integers(1, 9))
def test_a_mixer_costs_no_more_than_the_smaller_of_tokens_and_features(tokens, n_in, r, n_out) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, A, M, B = draw(0, (tokens,), n_in, r, n_out)

    def accumulate(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
        return 2 * left[0] * left[1] * right[1]  # torch counts a product, but not one that is added in place

    count = partial(FlopCounterMode, display=False, custom_mapping={torch.ops.aten.addmm_: accumulate})
    with count() as whole:
        out = ops.adapted_linear(x, weight.detach(), None, A, M, B, 0.7)
        forward = whole.get_total_flops()
        out.sum().backward()
    few = min(tokens, n_in)
    # Of LoRA, which has no mixer: the base's product and two of rank r, and twice as many of these in backward.
    base, thin = 2 * tokens * n_in * n_out, 2 * tokens * r * (n_in + n_out)
    assert forward == base + thin + 2 * r * r * few
    assert whole.get_total_flops() == 2 * base + 3 * thin + 8 * r * r * few
    with count() as generating, torch.no_grad():
        ops.adapted_linear(x[:1], weight, None, A, M, B, 0.7)
    assert generating.get_total_flops() == (base + thin) // tokens + 2 * r * r


def test_transforms_of_torch_func_see_the_oracle() -> None:
    x, weight, bias, A, M, B = (t.detach() for t in draw())

    def loss(function, x, *factors):  # type: ignore[no-untyped-def]
        return function(x, weight, bias, *factors, 0.7).square().sum()

    results = []
    for function in (ops.adapted_linear, oracle):
        one = torch.func.grad(loss, argnums=(1, 2, 3, 4))(function, x, A, M, B)
        each = torch.func.vmap(torch.func.grad(partial(loss, function)), in_dims=(0, None, None, None))(
            x, A, M, B
        )
        results.append([*one, each])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < RELATIVE[torch.float64]


def test_compiled_whole_it_gives_the_same() -> None:
    inputs = draw(dtype=torch.float32)
    compiled = torch.compile(ops.adapted_linear, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        gradients(compiled, inputs), gradients(ops.adapted_linear, inputs), strict=True
    ):
        assert relative_error(found, expected) < RELATIVE[torch.float32]


@pytest.mark.parametrize("tokens", [3, 8])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, tokens: int) -> None:
    results = []
    for function in (
        ops.adapted_linear,
        lambda *a: checkpoint(ops.adapted_linear, *a, use_reentrant=reentrant),
    ):
        inputs = draw(batch=(tokens,))
        out = function(*inputs, 0.7)
        out.backward(torch.ones_like(out))
        results.append([out, *(t.grad for t in inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("features", [32, 80])
def test_no_more_is_kept_for_backward_than_x_and_the_rank_r_product(features: int) -> None:
    x, weight, bias, A, M, B = draw(0, (64,), features, 4, 48)
    weight, bias = weight.detach(), bias.detach()
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ops.adapted_linear(x, weight, bias, A, M, B, 0.7)
    given_anyway = sum(t.untyped_storage().nbytes() for t in (x, weight, A, M, B))
    assert sum(kept.values()) <= given_anyway + 64 * 4 * 8


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
def test_with_a_frozen_a_nothing_of_the_size_of_x_is_kept_and_gradients_are_the_same(
    p: float, factors: torch.dtype
) -> None:
    inputs = [t.to(torch.float32) for t in draw(0, (64,), 80, 4, 48)]
    inputs[4] = inputs[4].to(factors)  # M may be wider than the others
    largest, results = 0, []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        if tensor.shape != (48, 80) and tensor.shape != (80, 48):  # the base weight
            largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    for wanted in (("x", "M", "B"), ("x", "A", "M", "B")):
        given = [t.detach().requires_grad_(n in wanted) for n, t in zip(NAMES, inputs, strict=True)]
        torch.manual_seed(2)
        largest = 0
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = ops.adapted_linear(*given, 0.7, p)
        assert (largest < 64 * 80 * 4) == ("A" not in wanted)
        out.square().sum().backward()
        results.append([out, *(t.grad for n, t in zip(NAMES, given, strict=True) if n in "xMB")])
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype and relative_error(one, two) < MODEL


def test_sizes_that_disagree_are_named() -> None:
    x, weight, bias, A, M, B = draw()
    with pytest.raises(ValueError, match="do not fit together"):
        ops.adapted_linear(x, weight, bias, A, M, B[:, :2], 1.0)
    with pytest.raises(ValueError, match="2 features"):
        ops.low_rank_update(x[..., :2], A, M, B, 1.0)


def test_fusing_can_be_switched_off_and_comes_back() -> None:
    assert ops.is_fusing()
    with pytest.raises(RuntimeError), ops.fusing(False):
        assert not ops.is_fusing()
        raise RuntimeError
    assert ops.is_fusing()


def oracle_with_dropout(x, weight, bias, A, M, B, scale, dropped, p):  # type: ignore[no-untyped-def]
    mask = torch.ones(x.numel(), dtype=x.dtype).index_fill(0, dropped, 0).view_as(x) / (1 - p)
    return F.linear(x, weight, bias) + functional.low_rank_update(x * mask, A, M, B, scale)


@given(
    st.integers(0, 2**16), st.lists(st.integers(0, 6), max_size=3).map(tuple), st.integers(1, 40),
    st.integers(1, 6), st.integers(1, 9), st.floats(1e-3, 0.25), st.booleans(),
)  # fmt: skip
def test_dropout_inside_equals_the_oracle_on_masked_input(seed, batch, n_in, r, n_out, p, base) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(seed, batch, n_in, r, n_out)
    torch.manual_seed(seed)
    dropped = ops.draw_dropped(inputs[0].numel(), p)

    def fast(x, weight, bias, A, M, B, scale):  # type: ignore[no-untyped-def]
        torch.manual_seed(seed)
        if base:
            return ops.adapted_linear(x, weight, bias, A, M, B, scale, p)
        return F.linear(x, weight, bias) + ops.low_rank_update(x, A, M, B, scale, p)

    def slow(*arguments):  # type: ignore[no-untyped-def]
        return oracle_with_dropout(*arguments, dropped, p)

    sizes = gradients(slow, [t.detach().abs().requires_grad_() for t in inputs], positive=True)
    for name, one, two, size in zip(
        ("out", *NAMES), gradients(fast, inputs), gradients(slow, inputs), sizes, strict=True
    ):
        if two.numel():
            assert relative_error(one, two, size) < RELATIVE[torch.float64], name


@pytest.mark.parametrize("batch", [(2, 3), (2, 2)])  # of 5 features
def test_gradgradcheck_with_dropout(batch: tuple[int, ...]) -> None:
    def seeded(*arguments):  # type: ignore[no-untyped-def]
        torch.manual_seed(3)
        return ops.adapted_linear(*arguments, 0.7, 0.25)

    assert torch.autograd.gradcheck(seeded, draw(batch=batch))
    assert torch.autograd.gradgradcheck(seeded, draw(batch=batch))


@pytest.mark.parametrize("p", [0.001, 0.05, 0.25])
def test_entries_are_dropped_independently_with_the_stated_probability(p: float) -> None:
    torch.manual_seed(0)
    n = 4_000_000
    dropped = ops.draw_dropped(n, p)
    assert bool((dropped[1:] > dropped[:-1]).all()) and int(dropped[0]) >= 0 and int(dropped[-1]) < n
    # Five standard deviations of a binomial count, for all entries and for pairs of neighbours.
    for found, chance in ((len(dropped), p), (int((dropped.diff() == 1).sum()), p * p)):
        assert abs(found - n * chance) < 5 * (n * chance) ** 0.5
    # Thirds of the row are hit alike.
    thirds = torch.bincount(dropped * 3 // n, minlength=3)
    assert float((thirds - n * p / 3).abs().max()) < 5 * (n * p / 3) ** 0.5


@pytest.mark.parametrize("p", [1e-30, 1e-12])
def test_a_probability_close_to_zero_drops_nothing(p: float) -> None:
    assert all(len(ops.draw_dropped(1000, p)) == 0 for _ in range(50))


def test_dropout_keeps_positions_and_no_mask() -> None:
    x, weight, bias, A, M, B = draw(0, (512,), 64, 4, 48, torch.float32)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ops.adapted_linear(x, weight.detach(), bias.detach(), A, M, B, 0.7, 0.05)
    given_anyway = sum(t.untyped_storage().nbytes() for t in (x, weight, A, M, B))
    mask = x.numel()  # of bytes
    assert sum(kept.values()) - given_anyway - 512 * 4 * 4 < mask / 3


def test_dropout_that_cannot_be_had_here_is_refused() -> None:
    *inputs, _ = (*draw(), None)
    with pytest.raises(ValueError, match=r"above 0\.25"):
        ops.adapted_linear(*inputs, 0.7, 0.5)


@pytest.fixture
def by_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop entries as on a GPU."""
    monkeypatch.setattr(ops, "why_no_fused_dropout", lambda *_: None)
    monkeypatch.setattr(ops, "why_no_dropout_by_position", lambda *_: "as on a GPU")


@pytest.mark.usefixtures("by_mask")
@pytest.mark.parametrize(
    "tokens, n_in, r", [(6, 9, 3), (12, 5, 2), (300, 7, 2)]
)  # M chained, composed, factors kept
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("base", ["inside", "beside", "none"])
def test_dropout_by_mask_equals_the_oracle_on_masked_input(
    tokens: int, n_in: int, r: int, p: float, base: str
) -> None:
    inputs = draw(3, (tokens,), n_in, r, 4)
    torch.manual_seed(5)
    mask = torch.native_dropout(inputs[0].detach().reshape(-1, n_in), p, True)[1].view_as(inputs[0])
    assert 0 < int(mask.sum()) < mask.numel()

    def fast(x, weight, bias, A, M, B, scale):  # type: ignore[no-untyped-def]
        torch.manual_seed(5)
        if base == "inside":
            return ops.adapted_linear(x, weight, bias, A, M, B, scale, p)
        alone = F.linear(x, weight, bias)
        if base == "beside":
            return ops.adapted_linear(x, None, None, A, M, B, scale, p, beside=alone)
        return alone + ops.low_rank_update(x, A, M, B, scale, p)

    def slow(x, weight, bias, A, M, B, scale):  # type: ignore[no-untyped-def]
        return F.linear(x, weight, bias) + functional.low_rank_update(x * mask / (1 - p), A, M, B, scale)

    for name, one, two in zip(("out", *NAMES), gradients(fast, inputs), gradients(slow, inputs), strict=True):
        assert relative_error(one, two) < RELATIVE[torch.float64], name


@pytest.mark.usefixtures("by_mask")
@pytest.mark.parametrize("batch", [(2, 3), (2, 2)])  # of 5 features
def test_gradgradcheck_with_dropout_by_mask(batch: tuple[int, ...]) -> None:
    def seeded(x, weight, bias, A, M, B):  # type: ignore[no-untyped-def]
        torch.manual_seed(3)
        return ops.adapted_linear(x, None, None, A, M, B, 0.7, 0.25, beside=F.linear(x, weight, bias))

    assert torch.autograd.gradcheck(seeded, draw(batch=batch))
    assert torch.autograd.gradgradcheck(seeded, draw(batch=batch))


@pytest.mark.parametrize("frozen", ["none", "A", "x"])
def test_what_stands_beside_is_left_as_it_is(frozen: str) -> None:
    x, weight, bias, A, M, B = draw()
    alone = F.linear(x, weight, bias).detach().requires_grad_()
    before = alone.detach().clone()
    if frozen != "none":
        {"A": A, "x": x}[frozen].requires_grad_(False)
    out = ops.adapted_linear(x, None, None, A, M, B, 0.5, beside=alone)
    expected = before + functional.low_rank_update(x, A, M, B, 0.5)
    assert relative_error(out, expected) < RELATIVE[torch.float64]
    G = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, [alone], G)
    assert torch.equal(grad, G) and torch.equal(alone.detach(), before)


def test_dropping_everything_is_left_to_torch() -> None:
    on_meta = torch.empty(2, 3, device="meta")
    assert ops.why_no_fused_dropout(on_meta, 0.5) is None
    assert "drops everything" in str(ops.why_no_fused_dropout(on_meta, 1.0))
