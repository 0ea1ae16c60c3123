"""The update of ``functional.py`` as one autograd Function: same signature, same values, less work.

With ``A' = s·M·A`` composed first (r²·in flops, no token dimension) the mixer costs nothing per token:

    H  = x·A'ᵀ                  y  = x·Wᵀ + b + H·Bᵀ
    D  = G·B                    dB = Gᵀ·H
    dA' = Dᵀ·x                  dA = s·Mᵀ·dA'      dM = s·dA'·Aᵀ
    dx = G·W + D·A'

Over fewer tokens than the layer has inputs it costs less between two products, r²·tokens; so the r²·in term is never
there to be seen, in a short batch or in generating token by token (``chains`` is the rule):

    K  = x·Aᵀ                   H  = s·K·Mᵀ        y and dB as above
    dM = s·Dᵀ·K                 E  = s·D·M         dA = Eᵀ·x        dx = G·W + E·A

Both sums are accumulated into the base's own product (``addmm_``), so no second ``(tokens, out)`` or
``(tokens, in)`` tensor is made; the scale stands with M, so no pass is made for it either. What is kept for backward is
x (which the base layer's input is anyway) and H or K, ``(tokens, r)``.

Dropout zeroes entries of x before A' and divides the rest by 1 - p, which goes into s. Drawing a mask is what
dropout costs on a CPU, so only the gaps between dropped entries are drawn, p of the numbers, and only the
positions are kept, a fifth of a byte mask at p = 0.05. In the backward pass the entries of dx at these
positions are put back to what the base's product was before the update was accumulated into it.

Precision: A' is composed, and M applied, in the dtype of M, as are the gradients of M and of M·A; products
over tokens that have in or out columns run in the dtype of ``x``, or in autocast's. Float32 factors on a bfloat16 base
therefore see what they would see under autocast.

On a GPU the same can be done by the Triton kernels of ``kernels.py``, where ``MOSLORA_KERNELS=1`` asks for them. On an
H100 they gained nothing without dropout and 4 % of a step with it, so they are off otherwise. Asked for, they are tried
at the first call of each size against the formulas above; where they cannot be compiled, or disagree, that size stays
on torch and a warning says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.core import kernels
from moslora.core.functional import check_factors

__all__ = [
    "adapted_linear",
    "draw_dropped",
    "fusing",
    "is_autocasting",
    "is_fusing",
    "is_using_kernels",
    "low_rank_update",
    "using_kernels",
    "why_no_dropout_by_position",
    "why_no_fused_dropout",
]

logger = logging.getLogger(__name__)

_fusing = True


def _read_switch(value: str | None) -> bool:
    """Return whether ``MOSLORA_KERNELS`` asks for the kernels."""
    if value not in (None, "", "0", "1"):
        raise ValueError(f"MOSLORA_KERNELS={value!r} says neither yes nor no; set it to 1 or 0.")
    return value == "1"


_using_kernels = _read_switch(os.environ.get("MOSLORA_KERNELS"))

# Above this share of dropped entries their positions, 4 bytes each, are more to keep than a byte mask of all.
LARGEST_SPARSE_DROPOUT = 0.25


def is_fusing() -> bool:
    """Tell whether layers may run base product and update as one Function."""
    return _fusing


@contextlib.contextmanager
def fusing(enabled: bool) -> Iterator[None]:
    """Switch the fused path of adapted layers on or off, to compare it with the slow one.

    Args:
        enabled: Whether layers may take the fused path inside the block.

    Yields:
        Nothing.
    """
    global _fusing
    previous, _fusing = _fusing, enabled
    try:
        yield
    finally:
        _fusing = previous


def is_using_kernels() -> bool:
    """Tell whether Triton kernels may be used: ``MOSLORA_KERNELS=1``, or ``using_kernels``."""
    return _using_kernels


@contextlib.contextmanager
def using_kernels(enabled: bool) -> Iterator[None]:
    """Switch the Triton kernels on or off, whatever ``MOSLORA_KERNELS`` says.

    Args:
        enabled: Whether the update may run in kernels inside the block, where they take its input.

    Yields:
        Nothing.
    """
    global _using_kernels
    previous, _using_kernels = _using_kernels, enabled
    try:
        yield
    finally:
        _using_kernels = previous


def why_no_fused_dropout(x: Tensor, p: float) -> str | None:
    """Tell why the update cannot drop entries of ``x`` itself; None if it can.

    Args:
        x: The layer's input.
        p: Probability with which an entry is dropped, in ``[0, 1)``.

    Returns:
        The reason, in words.
    """
    if p < 1 and _may_use_kernels(x, _compute_dtype(x), 1):
        return None
    return why_no_dropout_by_position(x, p)


def why_no_dropout_by_position(x: Tensor, p: float) -> str | None:
    """Tell why entries of ``x`` cannot be dropped by drawing their positions; None if they can.

    Args:
        x: The layer's input.
        p: Probability with which an entry is dropped, in ``[0, 1)``.

    Returns:
        The reason, in words.
    """
    if x.device.type != "cpu":
        return f"dropout by position is for CPUs, and the input is on {x.device.type}"
    if p > LARGEST_SPARSE_DROPOUT:
        return f"dropout {p:g} is above {LARGEST_SPARSE_DROPOUT:g}, where a mask is smaller than positions"
    if torch.compiler.is_compiling():
        return "dropout changes the update's input, and how many entries it drops is not known when compiling"
    return None


def draw_dropped(numel: int, p: float) -> Tensor:
    """Draw which entries are dropped, each with probability ``p``, independently.

    The number of entries kept between two dropped ones is geometric, ``⌊log(1 - u) / log(1 - p)⌋`` with u uniform
    in ``[0, 1)``. Drawn from torch's default generator, so that the same seed, or gradient checkpointing, gives the
    same entries. u has 24 bits: p is met to a few parts in 10⁷, not rounded to a 256th.

    Args:
        numel: How many entries there are.
        p: Probability, in ``(0, 1)``.

    Returns:
        Positions in ascending order, shape ``(dropped,)``, int64, on the CPU.
    """
    found, start = [], 0
    while start < numel:
        left = numel - start
        # Six standard deviations more than expected: a second turn is needed once in a billion.
        count = int(left * p + 6 * math.sqrt(left * p) + 16)
        gaps = torch.rand(count).neg_().log1p_().mul_(1 / math.log1p(-p))
        gaps.clamp_(max=left)  # for a p so small that a gap would be no int64; the conversion is the floor
        positions = gaps.to(torch.int64).add_(1).cumsum(0).add_(start - 1)
        found.append(positions)
        start = int(positions[-1]) + 1
    if not found:
        return torch.empty(0, dtype=torch.int64)
    drawn = found[0] if len(found) == 1 else torch.cat(found)
    return drawn[: int(torch.searchsorted(drawn, numel))]


def _without(x: Tensor, dropped: Tensor | None) -> Tensor:
    """Return ``x`` with the dropped entries at zero."""
    return x if dropped is None else x.flatten().index_fill(0, dropped.long(), 0).view_as(x)


def chains(tokens: int, features: int) -> bool:
    """Tell whether M is cheaper applied to so few tokens than composed into A.

    Both passes together, it is four products of 2·r²·features operations (M·A twice, Mᵀ·dA', dA'·Aᵀ) against four of
    2·r²·tokens (K·Mᵀ twice, D·M, Dᵀ·K).

    Args:
        tokens: How many rows the layer's input has.
        features: How many inputs the layer has.
    """
    return tokens < features


def is_autocasting(device: str) -> bool:
    """Tell whether autocast is on for a type of device; there are some that it does not know, such as meta.

    Args:
        device: The type.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    """Keep autocast from changing dtypes chosen here; free where it is off."""
    return torch.autocast(device, enabled=False) if is_autocasting(device) else contextlib.nullcontext()


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Return ``tensor`` in a dtype; asking first is quicker than ``to``, of which a step would call thousands."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _mix(H: Tensor, M: Tensor) -> Tensor:
    """Mix columns of rank r in the dtype of the factors."""
    return _in(H.dtype, _in(M.dtype, H) @ M)  # (tokens, r)


class _MixedUpdate(torch.autograd.Function):
    """``x·Wᵀ + b + s·drop(x)·Aᵀ·Mᵀ·Bᵀ``; W and b may be None, and so may ``dropped``."""

    # One method with ctx, not a setup_context: torch looks that one's signature up in every call, 50 µs each.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor,
        B: Tensor,
        scale: float,
        dropped: Tensor | None,
    ) -> Tensor:
        with _without_autocast(x.device.type):
            rows, scaled = x.reshape(-1, x.shape[-1]), M * scale  # (tokens, in), (r, r)
            chained = chains(*rows.shape)
            low = _in(x.dtype, A if chained else scaled @ _in(M.dtype, A))  # (r, in)
            kept = _without(rows, dropped) @ low.T  # (tokens, r)
            H = _mix(kept, scaled.T) if chained else kept  # (tokens, r)
            up = _in(x.dtype, B)
            if weight is None:
                out = F.linear(H.view(*x.shape[:-1], len(M)), up)  # (..., out)
            else:
                out = F.linear(rows.view(x.shape), weight, bias)  # (..., out)
                out.view(-1, len(B)).addmm_(H, up.T)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, M, B, kept, dropped)
        ctx.scale = scale
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, ...]:
        if G is None:
            return (None,) * 8
        x, weight, A, M, B, kept, dropped = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_M, need_B, *_ = ctx.needs_input_grad
        dx = dweight = dbias = dA = dM = dB = None
        low: Any = None
        D: Any = None
        with _without_autocast(x.device.type):
            twice = torch.is_grad_enabled()
            G, rows, scaled = G.reshape(-1, len(B)), x.reshape(-1, x.shape[-1]), M * ctx.scale
            chained = chains(*rows.shape)
            if need_x or twice:
                low = _in(x.dtype, A if chained else scaled @ _in(M.dtype, A))  # (r, in)
            if twice:
                # Being differentiated a second time: what was kept must be a function of x, M and A again.
                kept = _without(rows, dropped) @ low.T  # (tokens, r)
            if need_B:
                H = _mix(kept, scaled.T) if chained else kept  # (tokens, r)
                dB = _in(B.dtype, G.T @ H)  # (out, r)
            if need_A or need_M or need_x:
                D = G @ _in(x.dtype, B)  # (tokens, r)
            if chained:
                if need_M:
                    dM = (_in(M.dtype, D).T @ _in(M.dtype, kept)) * ctx.scale  # (r, r)
                if need_A or need_x:
                    D = _mix(D, scaled)  # (tokens, r)
                if need_A:
                    dA = _in(A.dtype, D.T @ _without(rows, dropped))  # (r, in)
            elif need_A or need_M:
                dlow = _in(M.dtype, D.T @ _without(rows, dropped))  # (r, in)
                dA = _in(A.dtype, scaled.T @ dlow) if need_A else None  # (r, in)
                dM = (dlow @ _in(M.dtype, A).T) * ctx.scale if need_M else None  # (r, r)
            if need_x:
                if weight is None or twice:
                    dx = _without(D @ low, dropped)  # (tokens, in)
                    dx = dx if weight is None else G @ weight + dx
                else:
                    dx = G @ weight
                    if dropped is None:
                        dx.addmm_(D, low)  # (tokens, in)
                    else:
                        positions, flat = dropped.long(), dx.view(-1)
                        undisturbed = flat.index_select(0, positions)
                        dx.addmm_(D, low)
                        flat.put_(positions, undisturbed)
                dx = dx.view(x.shape)
            if need_weight:
                dweight = G.T @ rows  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(ctx.bias_dtype)  # (out,)
        return dx, dweight, dbias, dA, dM, dB, None, None


def _by_torch_alone(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None,
) -> Tensor:
    """Return what ``_MixedUpdate`` does, of operations that torch can transform in every way."""
    with _without_autocast(x.device.type):
        low = (M * scale @ A.to(M.dtype)).to(x.dtype)  # (r, in)
        out = F.linear(F.linear(_without(x, dropped), low), B.to(x.dtype))  # (..., out)
        return out if weight is None else F.linear(x, weight, bias) + out


def _without_keeping_x(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropped: Tensor | None,
) -> Tensor:
    """Return what ``_MixedUpdate`` does where A is frozen, so that backward needs products of rank r in x's place."""
    with _without_autocast(x.device.type):
        H = F.linear(_without(x, dropped), _in(x.dtype, A))  # (..., r)
        H = _in(x.dtype, F.linear(_in(M.dtype, H), M * scale))  # (..., r)
        out = F.linear(H, _in(x.dtype, B))  # (..., out)
        return out if weight is None else F.linear(x, weight, bias) + out


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if is_autocasting(device) else x.dtype


# --- In kernels ---------------------------------------------------------------------------------------------


class _KernelUpdate(torch.autograd.Function):
    """``_MixedUpdate`` by the kernels: dropout is drawn from ``seed`` in both passes, and nothing of it is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        M: Tensor,
        B: Tensor,
        scale: float,
        p: float,
        seed: Tensor | None,
    ) -> Tensor:
        with _without_autocast(x.device.type):
            out, H = kernels.forward(
                x, weight, bias, M @ _in(M.dtype, A), B, scale, p, seed
            )  # (tokens, out), (tokens, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, A, M, B, H, seed)
        ctx.scale, ctx.p = scale, p
        return out

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, ...]:
        if G is None:
            return (None,) * 9
        x, weight, bias, A, M, B, H, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_M, need_B, *_ = ctx.needs_input_grad
        with _without_autocast(x.device.type):
            if torch.is_grad_enabled():
                return (*_twice_differentiable(ctx, G), None, None, None)
            dA = dM = dweight = dbias = None
            dx, dcomposed, dB = kernels.backward(
                G,
                x,
                weight,
                M @ _in(M.dtype, A),
                B,
                H,
                ctx.scale,
                ctx.p,
                seed,
                need_x,
                need_A or need_M,
                need_B,
            )
            if dcomposed is not None:
                dcomposed = _in(M.dtype, dcomposed)
                dA = _in(A.dtype, M.T @ dcomposed) if need_A else None  # (r, in)
                dM = dcomposed @ _in(M.dtype, A).T if need_M else None  # (r, r)
            if need_weight:
                dweight = G.T @ x  # (out, in)
            if need_bias:
                dbias = G.sum(0).to(bias.dtype)  # (out,)
        return dx, dweight, dbias, dA, dM, dB, None, None, None


def _twice_differentiable(ctx: Any, G: Tensor) -> list[Tensor | None]:
    """Take the gradients by torch's own operations, which can be differentiated again."""
    if ctx.p:
        raise RuntimeError(
            "A kernel's dropout cannot be differentiated twice. Set MOSLORA_KERNELS=0 for this, or dropout to 0."
        )
    x, weight, bias, A, M, B, _, _ = ctx.saved_tensors
    given = (x, weight, bias, A, M, B)
    out = _by_torch_alone(x, weight, bias, A, M, B, ctx.scale, None)
    wanted = [t for t, need in zip(given, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(out, wanted, G, create_graph=True))
    return [next(found) if need else None for _, need in zip(given, ctx.needs_input_grad, strict=False)]


# Signal to noise, in dB, that two ways of rounding the same sums keep from each other: about 46, 64 and 100 (66 with
# TF32). A wrong factor or mask leaves less than 10.
AGREEMENT_DB = {torch.bfloat16: 34.0, torch.float16: 50.0, torch.float32: 56.0}
_verdicts: dict[tuple[Any, ...], str | None] = {}
_told: set[str] = set()


def _tell_once(reason: str) -> None:
    """Say why kernels that were asked for are not used; once per reason, for there are hundreds of layers."""
    if not torch.compiler.is_compiling() and reason not in _told:
        _told.add(reason)
        logger.info("MoSLoRA runs on torch's operations: %s.", reason)


def _may_use_kernels(x: Tensor, dtype: torch.dtype, r: int) -> bool:
    """Tell whether the kernels were asked for and take such an input."""
    if not _using_kernels or torch.compiler.is_compiling() or not x.numel():
        return False
    return kernels.is_available(x.detach().new_empty(0, dtype=dtype), r)


def _why_no_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, p: float
) -> str | None:
    """Tell why the update of this ``x`` ``(tokens, in)`` does not run in kernels; None if it does.

    The first call of a size tries them; its verdict holds for the process.
    """
    r = A.shape[0]
    if A.dtype not in kernels.DTYPES:
        return f"factors of {A.dtype} are not for kernels"
    if not _may_use_kernels(x, x.dtype, r):
        return f"kernels do not take {x.dtype} on {x.device}, rank {r}"
    # Token counts up to a power of two share their configurations.
    size = (x.shape[0] - 1).bit_length()
    shape = (size, x.shape[1], B.shape[0], r, x.dtype, A.dtype, x.device)
    key = (*shape, weight is not None and weight.is_contiguous(), weight is None, bias is None, p > 0)
    if key not in _verdicts:
        try:
            with torch.autocast(x.device.type, enabled=False):
                _verdicts[key] = _try_kernels(x.detach(), weight, bias, A, B, p)
        except Exception as error:  # what a compiler or a driver may raise is not known here
            first = (str(error).splitlines() or [""])[0]
            _verdicts[key] = f"they failed ({type(error).__name__}: {first})"
        reason = _verdicts[key]
        if reason is not None:
            warnings.warn(
                f"MoSLoRA's kernels are not used for {x.shape[1]} → {B.shape[0]} features, rank {r}, {x.dtype}, about "
                f"{x.shape[0]} tokens: {reason}. torch's own operations are used there.",
                RuntimeWarning,
                stacklevel=4,
            )
    return _verdicts[key]


@torch.no_grad()
def _try_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, p: float
) -> str | None:
    """Run the kernels on an input and a weight like these and compare with torch; return what was wrong, or None.

    All but the weight is drawn for it, from a generator of its own: a new adapter has B = 0, which hides faults.
    """
    (T, n_in), (n_out, r) = x.shape, B.shape
    generator = torch.Generator(x.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=x.device)

    composed, factor = (draw(r, n_in) / n_in**0.5).to(A.dtype), (draw(n_out, r) / r**0.5).to(B.dtype)
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    x, G = torch.empty_like(x).copy_(draw(T, n_in)), draw(T, n_out).to(x.dtype)
    seed = torch.ones(1, dtype=torch.int64, device=x.device) if p else None
    kept, rescale = torch.ones((), dtype=torch.bool, device=x.device), 1.0
    if p:
        ones = torch.ones_like(composed), torch.ones_like(factor)
        mask, _, _ = kernels.backward(
            torch.ones_like(G), x, None, *ones, x.new_empty(T, r), 1.0, p, seed, need_A=False, need_B=False
        )
        assert mask is not None
        kept = mask != 0
        rate = kernels.dropout_probability(p)
        rescale = 1 / (1 - rate)
        found = 1 - float(kept.double().mean())
        if abs(found - rate) > 6 * (rate * (1 - rate) / kept.numel()) ** 0.5:
            return f"they dropped {found:.4f} of the entries instead of {rate:.4f}"
    low, up, dropped, scale = composed.to(x.dtype), factor.to(x.dtype), x * kept, 1.0
    out_here = dropped @ low.T @ up.T * rescale
    if weight is not None:
        # As large as the base's own product, so that it cannot hide behind it.
        base = F.linear(x, weight, bias)
        ratio = float(base.float().norm() / out_here.float().norm())
        scale = ratio if 0 < ratio < math.inf else 1.0
        out_here = base + out_here * scale
    H_here = dropped @ low.T * (rescale * scale)  # (tokens, r)
    D_here = G @ up * (rescale * scale)  # (tokens, r)
    dx_here = (D_here @ low) * kept
    dx_here = dx_here if weight is None else G @ weight + dx_here
    here = (out_here, dx_here, D_here.T @ dropped, G.T @ H_here)
    out, H = kernels.forward(x, weight, bias, composed, factor, scale, p, seed)
    grads = kernels.backward(G, x, weight, composed, factor, H, scale, p, seed)
    for name, one, two in zip(("output", "dx", "dA", "dB"), (out, *grads), here, strict=True):
        assert one is not None
        noise, size = (one.float() - two.float()).norm(), two.float().norm()
        agreement = float("inf") if noise == 0 else float(20 * torch.log10(size / noise))
        if not agreement >= AGREEMENT_DB[x.dtype]:  # NaN too
            return f"{name} agrees with torch's to {agreement:.0f} dB only, where {AGREEMENT_DB[x.dtype]:.0f} are due"
    return None


def low_rank_update(x: Tensor, A: Tensor, M: Tensor, B: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
    """Apply the update to ``x``, composing M·A first.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``; A and B of one dtype, M of it or a wider one.
        scale: ``alpha / r``, unitless.
        dropout: Probability with which an entry of x is dropped, in ``[0, 1)``; 0 in inference.

    Returns:
        ``scale · drop(x) Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree, or entries of this ``x`` cannot be dropped here.
    """
    return adapted_linear(x, None, None, A, M, B, scale, dropout)


def adapted_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    M: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Run a linear layer and its update as one Function.

    Args:
        x: Input, shape ``(..., in)``, any float dtype.
        weight: The base layer's weight, shape ``(out, in)``, dtype of ``x`` unless autocast is on. None
            leaves the base product out.
        bias: The base layer's bias, shape ``(out,)``, or None.
        A, M, B: Factors, shapes ``(r, in)``, ``(r, r)``, ``(out, r)``; A and B of one dtype, M of it or a wider one.
        scale: ``alpha / r``, unitless.
        dropout: Probability with which an entry of x is dropped before A, the others being divided by
            ``1 - dropout``; in ``[0, 1)``, 0 in inference. See ``why_no_fused_dropout``.

    Returns:
        ``x Wᵀ + b + scale · drop(x) Aᵀ Mᵀ Bᵀ``, shape ``(..., out)``, dtype of ``x``, or autocast's.

    Raises:
        ValueError: If the inner sizes disagree, or entries of this ``x`` cannot be dropped here.
    """
    check_factors(A, M, B)
    if x.shape[-1] != A.shape[1]:
        raise ValueError(f"x has {x.shape[-1]} features, but A {tuple(A.shape)} takes {A.shape[1]}.")
    dtype = _compute_dtype(x)
    inputs = _in(dtype, x)
    weight = weight if weight is None else _in(dtype, weight)
    bias = bias if bias is None else _in(dtype, bias)
    if _using_kernels and not torch.compiler.is_compiling():
        flat = inputs.reshape(-1, x.shape[-1])  # (tokens, in)
        unfit = _why_no_kernels(flat, weight, bias, A, B, dropout)
        if unfit is None:
            # From the generator of the device, so that seeds and gradient checkpointing decide the mask.
            seed = torch.randint(2**62, (1,), device=x.device) if dropout else None
            whole = _KernelUpdate.apply(flat, weight, bias, A, M, B, float(scale), dropout, seed)  # type: ignore[no-untyped-call]
            return whole.view(*x.shape[:-1], B.shape[0])  # type: ignore[no-any-return]
        _tell_once(unfit)
    dropped = None
    if dropout:
        if _using_kernels and why_no_dropout_by_position(x, dropout) is not None:
            # The layer was promised dropout inside before the kernels were tried.
            update = low_rank_update(F.dropout(x, dropout), A, M, B, scale)
            return update if weight is None else F.linear(x.to(dtype), weight, bias) + update
        reason = why_no_dropout_by_position(x, dropout)
        if reason is not None:
            raise ValueError(f"{reason}; drop entries of x with torch's own dropout, and pass dropout=0.")
        positions = draw_dropped(x.numel(), dropout)
        dropped = positions.int() if x.numel() < 2**31 else positions  # half of what is kept for backward
    arguments = (inputs, weight, bias, A, M, B, float(scale) / (1 - dropout), dropped)
    if torch.is_grad_enabled() and not A.requires_grad and (M.requires_grad or B.requires_grad):
        return _without_keeping_x(*arguments)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _by_torch_alone(*arguments)
    return _MixedUpdate.apply(*arguments)  # type: ignore[no-untyped-call, no-any-return]
