"""The kernels, proven without a GPU: run by Triton's interpreter, and compiled for Hopper.

Triton reads TRITON_INTERPRET as it is imported, and a process that has it set runs every kernel slowly. So the laws
that need it run in a process of their own, started by one test of this file on the same file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from moslora import MoSLoRAConfig
from moslora.core import functional, kernel_update, ops, switches
from moslora.core.kernels import launching, programs
from moslora.core.kernels import update as kernels
from tolerances import INTERPRETED_SNR_DB, RELATIVE, SNR_DB, relative_error, snr_db

pytestmark = [
    pytest.mark.skipif(
        not programs.HAS_TRITON, reason="Triton is not installed (it has no build for this system)"
    ),
]
interpreted = pytest.mark.skipif(
    not programs.INTERPRETED, reason="runs in the process that interprets kernels"
)
compiled = pytest.mark.skipif(programs.INTERPRETED, reason="an interpreted kernel is not compiled")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("out", "dx", "dcomposed", "dB")


def draw(seed: int, T: int, n_in: int, n_out: int, r: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (T, n_in),
        "weight": (n_out, n_in),
        "bias": (n_out,),
        "composed": (r, n_in),
        "B": (n_out, r),
    }
    return {
        name: torch.randn(*s, generator=generator).to(dtype)
        for name, s in (shapes | {"G": (T, n_out)}).items()
    }


def kept(T: int, n_in: int, p: float, seed: int) -> torch.Tensor:
    """Return the mask of the forward kernel: the rank-r product of ones with the rows of the identity."""
    parts = []
    for first in range(0, n_in, kernels.MAX_RANK):
        rows = torch.eye(n_in)[first : first + kernels.MAX_RANK]
        _, H = kernels.forward(torch.ones(T, n_in), None, None, rows, torch.zeros(1, len(rows)), 1.0, p, seed)
        parts.append(H != 0)
    return torch.cat(parts, 1)


def oracle(inputs, scale, mask, p, positive=False):  # type: ignore[no-untyped-def]
    """Return output and gradients by autograd, in float64; of absolute values, where their size is asked for."""
    t = {n: (v.double().abs() if positive else v.double()) for n, v in inputs.items()}
    wanted = [t[n].requires_grad_() for n in ("x", "composed", "B")]
    dropped = t["x"] * mask / (1 - kernels.dropout_probability(p))
    out = abs(scale) if positive else scale
    out = F.linear(t["x"], t["weight"], t["bias"]) + out * F.linear(F.linear(dropped, t["composed"]), t["B"])
    return [out, *torch.autograd.grad(out, wanted, t["G"])]


def run(inputs, scale, p=0.0, seed=None, fused=False):  # type: ignore[no-untyped-def]
    x, weight, composed, B = (inputs[n] for n in ("x", "weight", "composed", "B"))
    out, H = kernels.forward(x, weight, inputs["bias"], composed, B, scale, p, seed, fused=fused)
    grads = kernels.backward(inputs["G"], x, weight, composed, B, H, scale, p, seed, fused=fused)
    return [out, *grads]


def assert_equals_the_oracle(inputs, found, scale, mask=1.0, p=0.0):  # type: ignore[no-untyped-def]
    dtype = inputs["x"].dtype
    expected = oracle(inputs, scale, mask, p)
    sizes = oracle(inputs, scale, mask, p, positive=True)
    for name, one, two, size in zip(NAMES, found, expected, sizes, strict=True):
        assert one.shape == two.shape
        if dtype == torch.float32:
            assert relative_error(one.double(), two, size) < RELATIVE[dtype], name
        elif two.norm() > 0:
            assert snr_db(one, two) > SNR_DB[dtype], name


def test_laws_hold_in_tritons_interpreter() -> None:
    if programs.INTERPRETED:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[1],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


@interpreted
@settings(max_examples=12)
@given(
    st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 50), st.integers(1, 50), st.integers(1, 40),
    st.sampled_from(DTYPES), st.sampled_from([0.3, 1.0, -1.3, 45.25]), st.booleans(),
)  # fmt: skip
def test_value_and_every_gradient_equal_the_oracle(seed, T, n_in, n_out, r, dtype, scale, fused) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(seed, T, n_in, n_out, r, dtype)
    if dtype != torch.float32:
        inputs["weight"] *= 0.2  # the size of a trained one, so that the update is no rounding beside it
    assert_equals_the_oracle(inputs, run(inputs, scale, fused=fused), scale)


@interpreted
@settings(max_examples=8)
@given(
    st.integers(0, 2**16), st.integers(1, 70), st.integers(1, 50), st.integers(1, 50), st.integers(1, 40),
    st.sampled_from(DTYPES), st.sampled_from([0.05, 0.5, 0.9]), st.booleans(),
)  # fmt: skip
def test_dropout_equals_the_oracle_with_the_same_mask(seed, T, n_in, n_out, r, dtype, p, fused) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(seed, T, n_in, n_out, r, dtype)
    mask = kept(T, n_in, p, seed)
    assert_equals_the_oracle(inputs, run(inputs, 0.7, p, seed, fused), 0.7, mask, p)


@interpreted
@pytest.mark.parametrize(
    ("T", "n_in", "n_out", "r", "dtype"),
    [
        *((*sizes, torch.float32) for sizes in ((300, 24, 16, 3), (3, 300, 290, 33), (33, 20, 18, 256))),
        (300, 24, 16, 3, torch.bfloat16),
        (33, 20, 18, 256, torch.float16),
    ],
)
def test_sums_split_over_programs_equal_the_oracle(dtype, T, n_in, n_out, r) -> None:  # type: ignore[no-untyped-def]
    inputs = draw(1, T, n_in, n_out, r, dtype)
    mask = kept(T, n_in, 0.25, 5)
    found = run(inputs, 0.7, 0.25, 5)
    assert_equals_the_oracle(inputs, found, 0.7, mask, 0.25)
    assert all(torch.equal(a, b) for a, b in zip(found, run(inputs, 0.7, 0.25, 5), strict=True))


@interpreted
@pytest.mark.parametrize("fused", [False, True])
def test_any_strides_do(fused: bool) -> None:
    inputs = draw(2, 20, 24, 18, 5, torch.float32)
    expected = run(inputs, 0.7, 0.25, 3, fused)
    strided = dict(inputs)
    for name in ("x", "weight", "composed", "B", "G"):
        strided[name] = inputs[name].T.contiguous().T
    wide = torch.randn(20, 48)
    wide[:, ::2] = inputs["x"]
    for x in (strided["x"], wide[:, ::2]):
        found = run(strided | {"x": x}, 0.7, 0.25, 3, fused)
        # The base product of torch may sum in another order for another layout.
        for one, two in zip(found, expected, strict=True):
            assert relative_error(one, two) < RELATIVE[torch.float32]
    broadcast = {"G": torch.ones(1, 1).expand(20, 18)}
    whole = {"G": torch.ones(20, 18)}
    for one, two in zip(run(inputs | broadcast, 0.7), run(inputs | whole, 0.7), strict=True):
        assert relative_error(one, two) < RELATIVE[torch.float32]


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_no_tokens_give_empty_outputs_and_zero_gradients(p: float) -> None:
    out, dx, dcomposed, dB = run(draw(0, 0, 6, 7, 3, torch.float32), 1.0, p, 1)
    assert out.shape == (0, 7) and dx.shape == (0, 6)
    assert not dcomposed.any() and dcomposed.shape == (3, 6) and not dB.any() and dB.shape == (7, 3)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulating_adds_the_update_to_what_a_base_made(dtype: torch.dtype) -> None:
    t = draw(3, 20, 24, 18, 5, dtype)
    wide = torch.zeros(20, 36, dtype=dtype)
    out = wide[:, ::2]
    out += F.linear(t["x"], t["weight"], t["bias"])
    H = kernels.accumulate(out, t["x"], t["composed"], t["B"], 0.7, 0.25, 4)
    assert not wide[:, 1::2].any()
    dx, dA, dB = kernels.backward(t["G"], t["x"], None, t["composed"], t["B"], H, 0.7, 0.25, 4)
    whole = run(t, 0.7, 0.25, 4)
    assert all(torch.equal(a, b) for a, b in zip((out, dA, dB), (whole[0], *whole[2:]), strict=True))
    mask = kept(20, 24, 0.25, 4)
    expected = oracle(t | {"weight": torch.zeros_like(t["weight"])}, 0.7, mask, 0.25)[1]
    assert snr_db(dx, expected) > SNR_DB.get(dtype, 100.0)
    alone, _ = kernels.forward(t["x"], None, None, t["composed"], t["B"], 0.7, 0.25, 4)
    plain = {"weight": torch.zeros_like(t["weight"]), "bias": torch.zeros_like(t["bias"])}
    assert snr_db(alone, oracle(t | plain, 0.7, mask, 0.25)[0]) > SNR_DB.get(dtype, 100.0)
    with pytest.raises(ValueError, match="expanded view"):
        kernels.accumulate(torch.zeros(20, 1).expand(20, 18), t["x"], t["composed"], t["B"], 0.7)


@interpreted
def test_only_what_is_asked_for_is_made_and_equals_the_whole() -> None:
    t = draw(4, 20, 24, 18, 5, torch.float32)
    _, H = kernels.forward(t["x"], t["weight"], None, t["composed"], t["B"], 0.7)
    arguments = (t["G"], t["x"], t["weight"], t["composed"], t["B"], H, 0.7, 0.0, None)
    whole = kernels.backward(*arguments)
    for wanted in [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True)]:
        found = kernels.backward(*arguments, *wanted)
        assert tuple(g is not None for g in found) == wanted
        for one, two in zip(found, whole, strict=True):
            assert one is None or relative_error(one, two) < RELATIVE[torch.float32]


@interpreted
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_the_mask_has_its_rate_by_row_by_column_and_in_all(p: float) -> None:
    T, n_in = 128, 256
    mask = kept(T, n_in, p, 11)
    rate = 1 - kernels.dropout_probability(p)
    assert abs((1 - rate) - p) <= 0.5 / 65536
    for axis, count in ((None, T * n_in), (0, T), (1, n_in)):
        shares = mask.double().mean() if axis is None else mask.double().mean(axis)
        # 6 standard deviations: 2e-9 for one share, 1e-6 for all of them.
        assert (shares - rate).abs().max() < 6 * (rate * (1 - rate) / count) ** 0.5
    # Neighbours are independent: what both keep is the square of the rate.
    for both in (mask[1:] & mask[:-1], mask[:, 1:] & mask[:, :-1], mask[:, 8:] & mask[:, :-8]):
        deviation = 2 * rate * (1 - rate**2) ** 0.5 / both.numel() ** 0.5
        assert abs(both.double().mean() - rate**2) < 6 * deviation


@interpreted
def test_the_mask_is_that_of_its_seed_in_every_kernel_and_tile() -> None:
    T, n = 40, 48
    mask = kept(T, n, 0.5, 7)
    assert torch.equal(mask, kept(T, n, 0.5, 7))
    assert torch.equal(mask, kept(T, n, 0.5, torch.tensor([7])))
    for other in (8, 7 + 2**32, -7):
        agree = (mask == kept(T, n, 0.5, other)).double().mean()
        assert abs(agree - 0.5) < 6 * 0.5 / (T * n) ** 0.5
    assert torch.equal(mask[:9, :31], kept(9, 31, 0.5, 7))  # of the position, not of the shape
    ones, eye = torch.ones(T, n), torch.eye(n)
    _, H = kernels.forward(ones, None, None, eye, torch.ones(1, n), 1.0, 0.5, 7)
    dx, dA, _ = kernels.backward(torch.ones(T, 1), ones, None, eye, torch.ones(1, n), H, 1.0, 0.5, 7)
    assert torch.equal(dx != 0, mask)  # dH·I, masked
    counts = mask.sum(0).float() * 2
    assert torch.equal(dA, counts.expand(n, n))  # the sum over tokens of what was kept, rescaled
    zero = torch.zeros(1, n)
    fused, _, _ = kernels.backward(
        torch.ones(T, 1), ones, zero, eye, torch.ones(1, n), H, 1.0, 0.5, 7, fused=True
    )
    assert torch.equal(fused != 0, mask)


@interpreted
def test_every_configuration_gives_the_same_mask_and_the_oracles_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = draw(5, 20, 24, 18, 5, torch.float32)
    mask = kept(20, 24, 0.25, 6)
    for name, kernel in launching.KERNELS.items():
        for config in kernel.configs:
            only = {name: launching.Kernel(kernel.function, kernel.names, (config,))}
            with monkeypatch.context() as patch:
                patch.setattr(launching, "KERNELS", launching.KERNELS | only)
                assert_equals_the_oracle(inputs, run(inputs, 0.7, 0.25, 6, name == "linear"), 0.7, mask, 0.25)


@interpreted
def test_a_large_scale_does_not_overflow_float16_before_a_small_factor() -> None:
    t = draw(6, 8, 16, 8, 4, torch.float16)
    t["x"] = t["x"] * 4000
    t |= {"B": t["B"].float() * 0, "composed": t["composed"].float()}
    found = run(t, 512.0, 0.5, 1)
    assert all(one.isfinite().all() for one in found)


def test_the_probability_is_rounded_as_said_and_never_to_none() -> None:
    assert kernels.dropout_probability(0.0) == 0 and kernels.dropout_probability(0.5) == 0.5
    assert kernels.dropout_probability(1e-9) == 1 / 65536
    assert kernels.dropout_probability(1 - 1e-9) == 65535 / 65536
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="not a probability"):
            kernels.dropout_probability(wrong)


@interpreted
def test_what_does_not_fit_is_named() -> None:
    t = draw(0, 4, 6, 7, 3, torch.float32)
    x, weight, bias, composed, B = (t[n] for n in ("x", "weight", "bias", "composed", "B"))
    for wrong, words in (
        ((x, weight[:, :2], bias, composed, B), r"weight has shape \(7, 2\)"),
        ((x, weight, bias[:2], composed, B), "bias has shape"),
        ((x, weight, bias, composed[:, :2], B), "composed has shape"),
        ((x, weight, bias, composed, B[:, :2]), "B has shape"),
        ((x, weight.half(), bias, composed, B), "weight is torch.float16 and x torch.float32"),
        ((x, None, bias, composed, B), "A bias without a weight"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.forward(*wrong, 1.0)
    with pytest.raises(RuntimeError, match=r"ranks 1 to 256; found torch.float32 on cpu, rank 257"):
        kernels.forward(x, None, None, torch.ones(257, 6), torch.ones(7, 257), 1.0)
    with pytest.raises(ValueError, match="needs a seed"):
        kernels.forward(x, weight, bias, composed, B, 1.0, 0.5)
    with pytest.raises(ValueError, match="seed must be one int64"):
        kernels.forward(x, weight, bias, composed, B, 1.0, 0.5, torch.tensor([1.5]))
    assert kernels.is_available(x, 256) and not kernels.is_available(x.double())


# --- Called by the layers -----------------------------------------------------------------------------------


def factors(seed: int, T: int, n_in: int, n_out: int, r: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return x, weight, bias, A, M and B, of which the last three are float32, all to be differentiated."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, T, n_in), (n_out, n_in), (n_out,), (r, n_in), (r, r), (n_out, r))
    made = [torch.randn(*s, generator=generator) for s in shapes]
    return [t.to(dtype if i < 3 else torch.float32).requires_grad_() for i, t in enumerate(made)]


@pytest.fixture
def fresh_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_update, "_verdicts", {})


def update(inputs, p=0.0, seed=0, on=True, base=True):  # type: ignore[no-untyped-def]
    """Return output and every gradient of a layer and its update."""
    x, weight, bias, A, M, B = inputs
    torch.manual_seed(seed)
    with ops.using_kernels(on):
        out = ops.adapted_linear(x, *((weight, bias) if base else (None, None)), A, M, B, 0.7, p)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    wanted = inputs if base else [x, A, M, B]
    return [out, *torch.autograd.grad(out, wanted, cotangent)]


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [True, False])
def test_asked_for_they_give_what_torch_gives_with_every_gradient(dtype, base, fresh_verdicts) -> None:  # type: ignore[no-untyped-def]
    inputs = factors(1, 9, 24, 18, 5, dtype)
    found = update(inputs, base=base)
    assert list(kernel_update._verdicts.values()) == [None]  # tried, and taken
    exact = [t.detach().double().requires_grad_() for t in inputs]
    for one, two in zip(found, update(exact, on=False, base=base), strict=True):
        assert one.shape == two.shape
        if dtype == torch.float32:
            assert relative_error(one.double(), two) < RELATIVE[dtype]
        else:
            assert snr_db(one, two) > INTERPRETED_SNR_DB[dtype]


@interpreted
def test_their_dropout_is_that_of_the_seed_in_output_and_gradients(fresh_verdicts) -> None:  # type: ignore[no-untyped-def]
    inputs, p = factors(2, 6, 32, 18, 4, torch.float32), 0.25
    found = update(inputs, p, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(found, update(inputs, p, seed=5), strict=True))
    assert not torch.equal(found[0], update(inputs, p, seed=6)[0])
    torch.manual_seed(5)
    mask = kept(12, 32, p, torch.randint(2**62, (1,))).view(2, 6, 32)
    x, weight, bias, A, M, B = (t.detach().double().requires_grad_() for t in inputs)
    dropped = x * mask / (1 - kernels.dropout_probability(p))
    out = F.linear(x, weight, bias) + functional.low_rank_update(dropped, A, M, B, 0.7)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    expected = [out, *torch.autograd.grad(out, (x, weight, bias, A, M, B), cotangent.double())]
    for one, two in zip(found, expected, strict=True):
        assert relative_error(one.double(), two) < RELATIVE[torch.float32]


@interpreted
@pytest.mark.parametrize("fault", ["a factor left out", "a mask not applied", "it cannot be compiled", "NaN"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_kernels_that_disagree_or_fail_are_not_used_and_that_is_said(
    fault: str, p: float, monkeypatch: pytest.MonkeyPatch, fresh_verdicts: None
) -> None:
    real = kernels.forward

    def wrong(x, weight, bias, composed, B, scale, dropout_p=0.0, seed=None):  # type: ignore[no-untyped-def]
        if fault == "it cannot be compiled":
            raise RuntimeError("ptxas said no\nand more")
        if fault == "a mask not applied":
            return (
                real(x, weight, bias, composed, B, scale) if p else real(x, weight, bias, composed, -B, scale)
            )
        factor = 0.0 if fault == "a factor left out" else float("nan")
        return real(x, weight, bias, composed, B * factor, scale, dropout_p, seed)

    monkeypatch.setattr(kernels, "forward", wrong)
    inputs = factors(3, 16, 24, 18, 4, torch.float32)
    words = "ptxas said no" if fault == "it cannot be compiled" else "agrees with torch's to"
    with pytest.warns(RuntimeWarning, match=words):
        found = update(inputs, p, seed=1)
    # Here torch drops by position, as without kernels.
    assert all(torch.equal(a, b) for a, b in zip(found, update(inputs, p, seed=1, on=False), strict=True))
    update(inputs, p)  # said once


@interpreted
def test_a_dropout_that_only_they_could_do_falls_back_to_torchs(
    monkeypatch: pytest.MonkeyPatch, fresh_verdicts: None
) -> None:
    monkeypatch.setattr(kernel_update, "_try_kernels", lambda *_: "they are wrong")
    inputs = factors(3, 16, 24, 18, 4, torch.float32)
    with pytest.warns(RuntimeWarning, match="they are wrong"):
        found = update(inputs, 0.5, seed=1)[0]
    x, weight, bias, A, M, B = inputs
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    expected = F.linear(x, weight, bias) + functional.low_rank_update(dropped, A, M, B, 0.7)
    assert relative_error(found, expected) < RELATIVE[torch.float32]


@interpreted
def test_a_second_derivative_is_torchs_without_dropout_and_refused_with(fresh_verdicts) -> None:  # type: ignore[no-untyped-def]
    def second(on: bool, p: float = 0.0) -> torch.Tensor:
        inputs = factors(4, 3, 6, 5, 2, torch.float32)
        torch.manual_seed(0)
        with ops.using_kernels(on):
            out = ops.adapted_linear(*inputs, 0.7, p)
        (dx,) = torch.autograd.grad((out**2).sum(), inputs[0], create_graph=True)
        return torch.autograd.grad((dx**2).sum(), inputs[3])[0]

    assert relative_error(second(True), second(False)) < 10 * RELATIVE[torch.float32]
    with pytest.raises(RuntimeError, match="MOSLORA_KERNELS=0"):
        second(True, 0.25)


@interpreted
def test_a_model_trains_alike_with_them_and_checkpointing_changes_no_mask(fresh_verdicts) -> None:  # type: ignore[no-untyped-def]
    from peft import get_peft_model

    import tiny

    def gradients(on: bool, p: float, checkpointing: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = MoSLoRAConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=p)
        model = get_peft_model(tiny.llama(num_hidden_layers=1), config).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "moslora_B" in name:
                    parameter.normal_()
        if checkpointing:
            inner = model.get_base_model()
            inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        ids = tiny.tokens(1, 6)
        with ops.using_kernels(on):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    for name, one in gradients(True, 0.0).items():
        assert relative_error(one, gradients(False, 0.0)[name]) < 20 * RELATIVE[torch.float32], name
    assert len(kernel_update._verdicts) == 2 and set(kernel_update._verdicts.values()) == {None}
    plain, again = gradients(True, 0.3), gradients(True, 0.3, checkpointing=True)
    assert plain.keys() == again.keys() and len(plain) == 6
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch_is_off_unless_asked_for(value: str | None, on: bool) -> None:
    assert switches.read_switch(value) is on


def test_a_switch_that_says_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="set it to 1 or 0"):
        switches.read_switch("yes")


@compiled
def test_asked_for_where_they_cannot_run_torch_is_used_as_ever() -> None:
    inputs = factors(5, 6, 8, 7, 2, torch.float32)
    for p in (0.0, 0.25):
        found, expected = update(inputs, p, on=True), update(inputs, p, on=False)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"above 0\.25"), ops.using_kernels(False):
        ops.adapted_linear(*inputs, 0.7, 0.5)


@compiled
def test_without_a_gpu_the_kernels_are_not_for_this_tensor_and_say_so() -> None:
    assert not kernels.is_available(torch.ones(2, 2))
    with pytest.raises(RuntimeError, match=r"found torch.float32 on cpu, rank 1. Use moslora.core.ops"):
        kernels.forward(torch.ones(2, 2), None, None, torch.ones(1, 2), torch.ones(2, 1), 1.0)


def signature(arguments: dict) -> tuple[dict[str, str], dict[str, object]]:  # type: ignore[type-arg]
    """Return types and constants as Triton's compiler takes them, of the arguments of a launch."""
    pointers = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    }  # fmt: skip
    types, constants = {}, {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            types[name] = pointers[value.dtype]
        elif name.isupper() or value is None:
            types[name], constants[name] = "constexpr", value
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    return types, constants


@compiled
@pytest.mark.parametrize(
    ("dtype", "r", "p"),
    [(torch.bfloat16, 16, 0.05), pytest.param(torch.float16, 64, 0.0, marks=pytest.mark.trial)],
)
def test_every_launch_compiles_for_hopper_to_tensor_core_code(dtype, r, p, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    seen = set()

    def launch(name: str, grid: object, itemsize: int, **arguments: object) -> None:
        kernel = launching.KERNELS[name]
        blocks, warps, stages = kernel.fitting(arguments.get("R", 16), itemsize)[0]
        types, constants = signature({**arguments, **blocks})
        source = ASTSource(
            kernel.function, {n: types[n] for n in kernel.function.arg_names}, constants,
            {(kernel.function.arg_names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*"},
        )  # fmt: skip
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        if (name, str(constants)) in seen:
            return
        seen.add((name, str(constants)))
        built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        ptx = built.asm["ptx"]
        assert ".target sm_90a" in ptx
        assert name == "sum" or "wgmma" in ptx or "mma.sync" in ptx, name
        assert built.metadata.shared <= 227 * 1024, (name, built.metadata.shared)

    monkeypatch.setattr(kernels, "is_available", lambda *_: True)
    monkeypatch.setattr(launching, "launch", launch)
    t = draw(0, 512, 512, 256, r, dtype)
    for fused in (False, True):
        run(t, 0.7, p, 1, fused)
    assert {name for name, _ in seen} == set(launching.KERNELS) - (
        {"joint"} if r > kernels.JOINT_RANK else set()
    )
