"""Base product and update by the Triton kernels, as one autograd Function, and whether they may be used.

The kernels are tried at the first call of each size against torch's own operations; where they cannot be compiled, or
disagree, that size stays on torch and a warning says so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moslora.core import switches
from moslora.core.autocast import in_dtype, without_autocast
from moslora.core.fused_update import by_torch_alone
from moslora.core.kernels import update as kernels
from moslora.terminal import warn
from moslora.wording import first_line

__all__ = ["KernelUpdate", "may_use_kernels", "why_no_kernels"]


class KernelUpdate(torch.autograd.Function):
    """``MixedUpdate`` by the kernels: dropout is drawn from ``seed`` in both passes, and nothing of it is kept."""

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
        """Compute the output, and keep x and H."""
        with without_autocast(x.device.type):
            out, H = kernels.forward(
                x, weight, bias, M @ in_dtype(M.dtype, A), B, scale, p, seed
            )  # (tokens, out), (tokens, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, A, M, B, H, seed)
        ctx.scale, ctx.p = scale, p
        return out

    @staticmethod
    def backward(ctx: Any, G: Tensor | None) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are needed."""
        if G is None:
            return (None,) * 9
        x, weight, bias, A, M, B, H, seed = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_M, need_B, *_ = ctx.needs_input_grad
        with without_autocast(x.device.type):
            if torch.is_grad_enabled():
                return (*_twice_differentiable(ctx, G), None, None, None)
            dA = dM = dweight = dbias = None
            dx, dcomposed, dB = kernels.backward(
                G,
                x,
                weight,
                M @ in_dtype(M.dtype, A),
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
                dcomposed = in_dtype(M.dtype, dcomposed)
                dA = in_dtype(A.dtype, M.T @ dcomposed) if need_A else None  # (r, in)
                dM = dcomposed @ in_dtype(M.dtype, A).T if need_M else None  # (r, r)
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
    inputs = (x, weight, bias, A, M, B)
    out = by_torch_alone(x, weight, bias, A, M, B, ctx.scale, None)
    needs = ctx.needs_input_grad[: len(inputs)]
    gradients = iter(
        torch.autograd.grad(
            out, [t for t, need in zip(inputs, needs, strict=True) if need], G, create_graph=True
        )
    )
    return [next(gradients) if need else None for need in needs]


# Signal to noise, in dB, that two ways of rounding the same sums keep from each other: about 46, 64 and 100 (66 with
# TF32). A wrong factor or mask leaves less than 10.
AGREEMENT_DB = {torch.bfloat16: 34.0, torch.float16: 50.0, torch.float32: 56.0}
_verdicts: dict[tuple[Any, ...], str | None] = {}


def may_use_kernels(x: Tensor, dtype: torch.dtype, r: int) -> bool:
    """Tell whether the kernels were asked for and take such an input."""
    if not switches.kernels_are_on or torch.compiler.is_compiling() or not x.numel():
        return False
    return kernels.is_available(x.detach().new_empty(0, dtype=dtype), r)


def why_no_kernels(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor, B: Tensor, p: float
) -> str | None:
    """Tell why the update of this ``x`` ``(tokens, in)`` does not run in kernels; None if it does.

    The first call of a size tries them; its verdict holds for the process.
    """
    r = A.shape[0]
    if A.dtype not in kernels.DTYPES:
        return f"factors of {A.dtype} are not for kernels"
    if not may_use_kernels(x, x.dtype, r):
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
            _verdicts[key] = f"they failed ({type(error).__name__}: {first_line(error)})"
        reason = _verdicts[key]
        if reason is not None:
            warn(
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
