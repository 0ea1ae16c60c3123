"""LoRA that began with PiSSA or OLoRA, as PEFT saves it: its start is computed again from the base and subtracted.

PEFT takes the start out of the base weight, in memory, when the adapter is made and again each time it is loaded:

    W0 - s·B0·A0 + s·B·A    so that on the untouched base    ΔW = s·(B·A - B0·A0), of twice the rank

The file has A and B alone. A0 and B0 are a function of W0, r and s, computed here as ``LoraLayer.pissa_init`` and
``olora_init`` do (PEFT 0.18 to 0.21), in float32, and then held against what defines them in float64.

    PiSSA    W0 ≈ U·diag(σ)·Vᵀ, the r leading    A0 = diag(√(σ/s))·Vᵀ    B0 = U·diag(√(σ/s))
    OLoRA    W0 = Q·R                            A0 = R[:r]              B0 = Q[:, :r]

OLoRA decomposes the weight as it is stored, PiSSA as (out, in). Embeddings begin as without a start, in PEFT too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moslora.adapters.factors import Adapter, Begun, Factors, product_norm
from moslora.adapters.fit import Fit, fit_to_base
from moslora.adapters.formats.lora_fields import CHANGED_BASE, CONVERT, MERGE_WITH_PEFT
from moslora.adapters.orientation import is_transposed
from moslora.core import functional
from moslora.errors import AdapterError, ModelError, ProofError
from moslora.models.shards import StoredWeights, open_weights

__all__ = ["subtract_base_start"]

NAMES = {"pissa": "PiSSA", "olora": "OLoRA"}
# What float32 leaves of the equations that define a start, relative to the weight: some n·ε, n up to 16384.
DEFINED = 1e-3
# Beyond this share of ΔW a start depends on who computes it, since two components are of one size.
UNSURE = 0.1


def subtract_base_start(
    adapter: Adapter,
    start: str,
    where: Path,
    base: str | None,
    say: Callable[[str], None] = lambda _: None,
) -> Adapter:
    """Subtract from a PEFT adapter what its start took out of the base weight.

    Args:
        adapter: Its factors as the file has them.
        start: ``"pissa"`` or ``"olora"``.
        where: The adapter, for messages.
        base: The untouched base; None for the one that the adapter names, if that is a folder here.
        say: Receives a line before long work.

    Returns:
        The adapter that does on the untouched base what stock PEFT does after loading, of twice the rank.

    Raises:
        AdapterError: If there is no base, or PEFT itself has no such start for a module.
        ModelError: If the base cannot be read, or does not fit.
        ProofError: If the start could not be computed, or not well enough.
    """
    named = adapter.config.get("base_model_name_or_path")
    is_named = base is None and isinstance(named, str) and Path(named, "config.json").is_file()
    source = str(named) if is_named else base
    name = NAMES[start]
    if source is None:
        raise AdapterError(
            f"{where} began with {name}: its factors mean s·(B·A - B0·A0), and B0·A0, which was taken out of "
            "the base weight, "
            "is computed from the base. Give --base MODEL, the model that it was trained on, unchanged"
            f"{f' (it names {named})' if named else ''}. {CONVERT} {CHANGED_BASE}"
        )
    weights = open_weights(source, say)
    if weights.quantization:
        raise ModelError(
            f"{where} began with {name}, and {source} has quantized weights ({weights.quantization}), whose start PEFT "
            f"rounds again. {MERGE_WITH_PEFT}"
        )
    fit = fit_to_base(adapter, weights, source)
    if fit.unexpected:
        fit.refuse()
    places = dict(zip(adapter.modules, fit.adapter.modules, strict=True))  # both in the order of the file
    say(f"Computing where {len(adapter.modules)} modules began ({name}), from {source}.")
    modules, unsure, moved = {}, 0.0, []
    for module, factors in adapter.modules.items():
        if factors.form.kind == "embedding":
            modules[module] = factors
            continue
        A0, B0, share = _begin(start, places[module], factors, fit, weights, where)
        whole = _difference(factors, A0, B0)
        size, begun = whole.norm(), abs(factors.scale) * product_norm(B0, A0)
        if size:
            unsure = max(unsure, share / size)
            moved.append(size / begun if begun else float("inf"))
        if unsure > UNSURE:
            raise ProofError(
                f"{where}: {module}: where it began with {name} is not determined by the base's weight: two of "
                "its components "
                f"are of one size, up to rounding, so that another processor finds another start ({unsure:.1e} of ΔW). "
                f"{CONVERT}"
            )
        at_least = torch.promote_types(factors.A.dtype, torch.float32)
        A, M, B = (t.to(at_least) for t in (whole.A, whole.M, whole.B))
        modules[module] = replace(whole, A=A, M=M, B=B)
    config = {**adapter.config, "init_lora_weights": start}
    median = sorted(moved)[len(moved) // 2] if moved else 0.0
    return replace(
        adapter, modules=modules, config=config, begun=Begun(name, source, is_named, unsure, median)
    )


def _difference(factors: Factors, A0: Tensor, B0: Tensor) -> Factors:
    """Make factors of ``B·A - B0·A0`` in float64."""
    eye = torch.eye(factors.r, dtype=torch.float64)
    A, M, B = functional.subtract_start((factors.A.double(), eye, factors.B.double()), (A0, eye, B0))
    return replace(factors, A=A, M=M, B=B)


def _begin(
    start: str,
    module: str,
    factors: Factors,
    fit: Fit,
    weights: StoredWeights,
    where: Path,
) -> tuple[Tensor, Tensor, float]:
    """Return A0, B0 in float64, and how much of ``s·B0·A0`` rounding leaves open, as a Frobenius norm."""
    if factors.form.kind != "linear":
        raise AdapterError(
            f"{where}: {module} is a {factors.form.kind}, for which PEFT has no start {NAMES[start]}; it does "
            "not load such an "
            "adapter either."
        )
    if fit.is_shared(module):
        raise ModelError(
            f"{where}: {module} shares its weight between embedding and head, so {NAMES[start]} took its start "
            "out of both, and "
            f"no adapter of the head does that. {MERGE_WITH_PEFT}"
        )
    name = fit.stored_name(module)
    weight = weights.read(name)
    shape = (factors.B.shape[0], factors.A.shape[1])
    turned = is_transposed(fit, module, shape, tuple(weight.shape))
    if tuple(weight.shape) != (shape[::-1] if turned else shape):
        raise ModelError(
            f"{module}: the adapter changes a linear weight of (out, in) {shape}, the base's is "
            f"{tuple(weight.shape)}. Name the "
            "base that the adapter was trained on."
        )
    if weight.dtype == torch.float64:
        raise ModelError(
            f"{name} is stored in float64, in which PEFT begins no {NAMES[start]}. Save the base in 32 or 16 bits."
        )
    weight = weight.float()
    if start == "olora":
        A0, B0, share = _olora(weight, factors.r, factors.scale, module)
        return (B0.T, A0.T, share) if turned else (A0, B0, share)
    return _pissa(weight.T if turned else weight, factors.r, factors.scale, module)


def _pissa(weight: Tensor, r: int, scale: float, module: str) -> tuple[Tensor, Tensor, float]:
    """Decompose ``(out, in)`` in float32, as PEFT does."""
    if not scale > 0:
        raise AdapterError(
            f"{module}: PiSSA takes the square root of its components over alpha / r, which is {scale:g} here. "
            "Fix lora_alpha."
        )
    U, values, Vh = torch.linalg.svd(weight, full_matrices=False)
    roots = torch.diag(torch.sqrt(values[:r] / scale))
    A0, B0 = (roots @ Vh[:r]).double(), (U[:, :r] @ roots).double()
    W = weight.double()
    gram_A, gram_B = A0 @ A0.T, B0.T @ B0
    errors = (W @ A0.T - scale * B0 @ gram_A, W.T @ B0 - scale * A0.T @ gram_B)
    _check(module, max(map(_norm, errors)), float(values[0]) * float(values[0] / scale) ** 0.5)
    sizes, rounding = values.double(), torch.finfo(torch.float32).eps * float(values[0])
    if r == len(sizes) or float(sizes[r - 1]) <= len(sizes) * rounding:  # the start is all of the weight
        return A0, B0, rounding
    gap = float(sizes[r - 1] - sizes[r])  # to the component that is left in the base
    return A0, B0, 2**0.5 * rounding * float(sizes[r - 1]) / gap if gap > 0 else float("inf")


def _olora(weight: Tensor, r: int, scale: float, module: str) -> tuple[Tensor, Tensor, float]:
    """Decompose a weight as it is stored, in float32, as PEFT does."""
    Q, R = torch.linalg.qr(weight)
    A0, B0 = R[:r].double(), Q[:, :r].double()
    W = weight.double()
    errors = (B0.T @ W - A0, (B0 @ A0 - W)[:, :r])  # Q is orthogonal, and its first columns span those of W0
    size = _norm(W)
    if size == 0:
        return A0, B0, 0.0
    _check(module, max(map(_norm, errors)), size)
    values = torch.linalg.svdvals(A0[:, :r])
    spread = float(values[0] / values[-1]) if values[-1] > 0 else float("inf")
    return A0, B0, abs(scale) * torch.finfo(torch.float32).eps * spread * size


def _check(module: str, error: float, size: float) -> None:
    if not error <= DEFINED * size:
        raise ProofError(
            f"{module}: the decomposition of its weight is off by {error / size if size else error:.1e}. Does "
            "the base hold NaN "
            "or infinite values?"
        )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.norm(matrix))
